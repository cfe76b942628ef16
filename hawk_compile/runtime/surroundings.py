"""What a prefill is called inside of: modes that see its operators, tracers that record them, switches of
torch.compile. Each is served, or refused by its name before anything has run: Dynamo would pass over the frame, and for
good.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawk_compile.capture.hooks import refuse_global_hooks
from hawk_compile.capture.modalities import tokens_of
from hawk_compile.compat.dynamo import compiles_all, is_in_force, is_switched_off, is_transformed
from hawk_compile.compat.modes import (
    bars_graphs,
    dispatch_modes,
    function_modes,
    global_hooks,
    graphs_let_in,
    has_values,
    inside_function_modes,
    is_tracer,
    sets_devices,
    without_global_hooks,
)
from hawk_compile.errors import UnsupportedCallError

SWITCH = "TORCHDYNAMO_DISABLE"
"""The variable that makes torch.compile return what it is given; read when it is called."""


def refuse_surroundings(kwargs: dict[str, Any]) -> None:
    """Refuse to prune where no graph can be compiled or none can run.

    Raises:
        UnsupportedCallError: it names the tracer, the transform, the switch or the hooks.
    """
    tokens = tokens_of(kwargs)
    if tracer := tracer_around(tokens):
        raise UnsupportedCallError(
            f"{tracer} was asked of a pruned prefill, which is a compiled graph of its own that nothing can trace: "
            "give batches as rows, take hawk_compile.export to write a model, or hawk_compile.restore it"
        )
    if isinstance(tokens, Tensor) and not has_values(tokens):
        raise UnsupportedCallError(
            f"the prompt is a {type(tokens).__name__} on {tokens.device} without the numbers from which a pruned "
            "prefill reads whose text votes: give real tensors, or hawk_compile.restore(model) to work out the shapes "
            "of the unpruned model"
        )
    if switch := switch_of_compile():
        raise UnsupportedCallError(
            f"torch.compile is switched off ({switch}), and tokens are pruned inside a graph that it captures: switch "
            'it on, with optimize(model, backend="eager") if code is not to be generated, or '
            "hawk_compile.restore(model) to run the model unpruned"
        )
    refuse_global_hooks()


def tracer_around(tokens: Any) -> str:
    """What traces this thread's calls, in words; "" if nothing does."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if isinstance(tokens, torch.fx.Proxy):
        return "torch.fx.symbolic_trace"
    if is_transformed():
        return "torch.func (vmap, grad, jvp)"
    if tracers := [type(mode).__name__ for mode in dispatch_modes() if is_tracer(mode)]:
        return f"{tracers[-1]}, of fake tensors, make_fx or torch.export"
    return ""


def switch_of_compile() -> str:
    """What keeps torch.compile from compiling in this thread, in words; "" if nothing does."""
    if os.environ.get(SWITCH) == "1":
        return f"{SWITCH}=1 in the environment"
    if is_switched_off():
        return "torch._dynamo.config.disable, which TORCH_COMPILE_DISABLE=1 in the environment sets too"
    return ""


@dataclass(frozen=True)
class Watchers:
    """Modes of this thread that are to see each operator that runs inside them, outermost first.

    Attributes:
        dispatch: TorchDispatchModes, such as that of a FlopCounterMode.
        function: all TorchFunctionModes, those that only set the device of new tensors among them.
        tracks_modules: whether torch calls hooks for every module, as a FlopCounterMode lets it.
    """

    dispatch: tuple[Any, ...]
    function: tuple[Any, ...]
    tracks_modules: bool

    @property
    def any(self) -> bool:
        return bool(self.dispatch) or self.tracks_modules or not all(map(sets_devices, self.function))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let a graph be captured inside, which none of them sees; dispatch modes see it when it runs."""
        devices = [mode for mode in self.function if sets_devices(mode)]
        hooks = without_global_hooks() if self.tracks_modules else contextlib.nullcontext()
        with hooks, graphs_let_in(self.dispatch), inside_function_modes(devices):
            before, seeing.watchers = getattr(seeing, "watchers", None), self
            try:
                yield
            finally:
                seeing.watchers = before


seeing = threading.local()
"""`watchers`: those that see what the graph of this thread's call runs."""


def watchers_around() -> Watchers:
    barring = tuple(mode for mode in dispatch_modes() if bars_graphs(mode))
    return Watchers(barring, tuple(function_modes()), bool(global_hooks()))


@contextlib.contextmanager
def seen_by_watchers() -> Iterator[None]:
    """Let function modes see what runs inside, where they were set aside while its graph was captured."""
    watchers: Watchers | None = getattr(seeing, "watchers", None)
    with inside_function_modes(watchers.function) if watchers is not None else contextlib.nullcontext():
        yield


class DefaultStance:
    """Lets torch.compile compile, whatever `torch.compiler.set_stance` says, which is one for the whole process.

    Calls run side by side: the first sets the stance aside and the last puts it back. One that others set in between is
    set aside by the next call, and is what is left behind.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Guards the two below."""
        self.users = 0
        self.ours: Any = None
        """What set the stance aside, and knows what it was; None where nothing was."""

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not compiles_all():
                self.ours = torch.compiler.set_stance("default")
            counted = self.ours is not None
            self.users += counted
        try:
            yield
        finally:
            if counted:
                with self.lock:
                    self.users -= 1
                    if self.users == 0:
                        ours, self.ours = self.ours, None
                        if is_in_force(ours):
                            ours.__exit__(None, None, None)


compiling = DefaultStance()
"""compiling(): uncompiled there is no pruned prefill."""
