"""How Dynamo captures a prefill as one graph with a symbolic prompt length and a symbolic number of visual tokens.

Its defaults break at values read from tensors and give equal sizes one symbol: `capture_settings` changes them while a
graph is captured, and only then.
"""

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from hawk_compile.capture.modalities import PER_TOKEN_INPUTS
from hawk_compile.compat.dynamo import (
    FailOnRecompileLimitHit,
    ShortenTraceback,
    TorchDynamoException,
    compile_and_forget,
    dynamo_settings,
    shape_settings,
    sizes_named_in_texts,
    texts_going_with_code,
)
from hawk_compile.compat.peft import let_weights_be_read
from hawk_compile.kernels.compat import check

CAPTURE_FAILURES = (TorchDynamoException, FailOnRecompileLimitHit, GuardOnDataDependentSymNode)
"""What Dynamo and torch.export raise when they cannot capture a function as one graph."""

CompilerFailed = ShortenTraceback
"""What Dynamo raises when what it hands a graph to raises; `inner_exception`, where it has one, is that."""

RECOMPILE_LIMIT = 64
"""Compilations that one model may need: one for each structure of its calls (a batch, padding, video, ...)."""

UNCUT = {"optimize_ddp": False}
"""Inside DistributedDataParallel Dynamo would cut graphs where gradients are sent, of which there are none."""

capture_lock = threading.RLock()
"""Held while something is captured for the first time: an export changes the models' code for the whole process while
it traces. What is compiled already runs without it."""


thread = threading.local()
"""`captures`: whether this thread captures."""


@contextlib.contextmanager
def capture_settings() -> Iterator[None]:
    """Dynamo's settings for what is captured inside. Each thread has its own."""
    with (
        dynamo_settings(
            capture_scalar_outputs=True,
            capture_dynamic_output_shape_ops=True,
            specialize_float=True,
            suppress_errors=False,  # what cannot be captured would run without being pruned
            **UNCUT,
            skip_nnmodule_hook_guards=False,
            accumulated_recompile_limit=32 * RECOMPILE_LIMIT,
        ),
        shape_settings(use_duck_shape=False),
        sizes_named_in_texts(),
        texts_going_with_code(),
    ):
        let_weights_be_read()
        before = is_capturing()
        try:
            thread.captures = True
            yield
        finally:
            thread.captures = before


def is_capturing() -> bool:
    """Whether this thread is inside `capture_settings`."""
    return getattr(thread, "captures", False)


def compile_alone(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """torch.compile with graphs that count towards no other function's limit, and that go with what is returned.

    The backend may not hold that: Dynamo holds the backend where no garbage collector looks. Of a graph that is `taken`
    the symbols of its sizes stay.

    `isolate_recompiles` counts alone too, but by a number that is one for the whole process: a call that ends in one
    thread changes it for what begins in another, which finds no graph then and is compiled again.
    """
    ours = {"dynamic": True, "recompile_limit": RECOMPILE_LIMIT}
    return compile_and_forget(with_own_code(function), **{**ours, **settings})


def without_holding(method: Callable[..., Any]) -> Callable[..., Any]:
    """What calls a method of an object that lives elsewhere, and does not keep it alive: Dynamo holds what it is given
    in a place that no garbage collector sees."""
    living = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        called = living()
        assert called is not None  # a call of the object's own is under way
        return called(*args)

    return call


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function or method: Dynamo keeps and counts graphs by code, and remembers sizes by its name."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name=function.__name__)
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def equate_lengths(inputs: dict[str, Any], question_mask: Tensor, along: tuple[str, ...] = ()) -> None:
    """Tell the capture which inputs run along the prompt, so that their lengths are one symbol S, and their rows one B.

    By these a mask is known to be as long as the prompt; no operator says so.

    Args:
        along: names of inputs of shape [..., B, S] beside those that every model has; see `along_prompt`.
    """
    for name in (*PER_TOKEN_INPUTS, *along):
        given = inputs.get(name)
        if isinstance(given, Tensor):
            rows, length = (given.shape[0], given.shape[1]) if name == "inputs_embeds" else given.shape[-2:]
            check(length == question_mask.shape[-1])
            if rows != 1:
                check(rows == question_mask.shape[0])
