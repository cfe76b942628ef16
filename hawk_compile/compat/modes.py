"""Private names of what a call may run inside of: modes that see its operators, tracers, hooks of every module."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard
from torch._C._dynamo.guards import set_is_in_mode_without_ignore_compile_internals as say_that_a_mode_bars_graphs
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.overrides import _pop_mode as pop_function_mode
from torch.overrides import _push_mode as push_function_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

__all__ = ["dispatch_modes", "function_modes"]


def switches_of_torch() -> str:
    """What torch.compile asks of the process and of this thread, as JSON: gradients, autocast, the default dtype,
    deterministic algorithms, threads."""
    return str(GlobalStateGuard().__getstate__())


def is_tracer(mode: Any) -> bool:
    """Whether a dispatch mode is one by which torch itself traces: with fake tensors, into a graph, into functions."""
    return bool(mode.is_infra_mode())


def bars_graphs(mode: Any) -> bool:
    """Whether a dispatch mode is to see every operator, so that torch.compile leaves alone what runs inside it."""
    return not (mode.is_infra_mode() or mode.ignore_compile_internals())


def sets_devices(mode: Any) -> bool:
    """Whether a function mode is one of `with torch.device(...)` or `torch.set_default_device`."""
    return isinstance(mode, DeviceContext)


def has_values(tensor: Tensor) -> bool:
    """Whether numbers can be read from a tensor: not where it is fake, or on the meta device."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


@contextlib.contextmanager
def graphs_let_in(barring: Sequence[Any]) -> Iterator[None]:
    """Let torch.compile compile inside dispatch modes that bar it; they see what the graph runs, if that is operators.

    Args:
        barring: `bars_graphs` holds of each; each is this thread's.
    """
    for mode in barring:
        vars(mode)["ignore_compile_internals"] = always
    say_that_a_mode_bars_graphs(not barring)
    try:
        yield
    finally:
        say_that_a_mode_bars_graphs(bool(barring))
        for mode in barring:
            vars(mode).pop("ignore_compile_internals", None)


def always() -> bool:
    return True


@contextlib.contextmanager
def inside_function_modes(wanted: Sequence[Any]) -> Iterator[None]:
    """Be inside these function modes, outermost first, and no others."""
    before = function_modes()
    put_function_modes(wanted)
    try:
        yield
    finally:
        put_function_modes(before)


def put_function_modes(wanted: Sequence[Any]) -> None:
    for _ in function_modes():
        pop_function_mode()
    for mode in wanted:
        push_function_mode(mode)


GLOBAL_HOOKS = tuple(
    getattr(modules, name)
    for name in (
        "_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks",
    )
)  # fmt: skip
"""The dictionaries of hooks that torch calls for every module."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The attributes of a module that hold its hooks, by number."""


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """What is called around a module's forward and backward."""
    return [hook for name in HOOKS for hook in getattr(module, name).values()]


def global_hooks() -> list[Any]:
    """What is called around the forward and backward of every module."""
    return [hook for held in GLOBAL_HOOKS for hook in held.values()]


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Call no hooks of every module inside, in any thread."""
    before = [dict(held) for held in GLOBAL_HOOKS]
    for held in GLOBAL_HOOKS:
        held.clear()
    try:
        yield
    finally:
        for held, hooks in zip(GLOBAL_HOOKS, before, strict=True):
            held.update({**hooks, **held})
