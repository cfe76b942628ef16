"""Who waits for whom: only captures take turns, what is captured already runs side by side.

Dynamo's settings are each thread's own (`torch._dynamo.config.patch`), and Dynamo compiles one function at a time. What
the lock guards is the code of the models, which an export changes for the whole process while it traces: a call that
has to be captured waits for it. It also lets threads that meet a new structure at once share one compilation. It is let
go where the graph begins to run, in the very call that captured it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from transformers import Cache

from hawk_compile.capture.dynamo import capture_lock, capture_settings

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Turns:
    """Captures of one function, one structure of its calls after another."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.thread = threading.local()

    @contextlib.contextmanager
    def taking(self, *arguments: Any) -> Iterator[None]:
        """Around a call with these arguments; Dynamo's settings are those of a capture inside."""
        structure = (structure_of(arguments), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if structure not in self.seen:
            capture_lock.acquire()
            self.thread.captures = True
        try:
            with capture_settings():
                yield
            self.seen.add(structure)
        finally:
            self.end_capture()

    def end_capture(self) -> None:
        """Let other threads capture, if it is this one's turn."""
        if getattr(self.thread, "captures", False):
            self.thread.captures = False
            capture_lock.release()

    def backend(self, compiler: Compiler) -> Compiler:
        """A compiler of Dynamo's graphs that end the capture they came from when they begin to run."""

        def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            compiled = compiler(gm, example_inputs)

            def run(*args: Any) -> Any:
                self.end_capture()
                return compiled(*args)

            return run

        return compile_graph


def structure_of(value: Any) -> Any:
    """What two calls share that one compiled graph serves, as far as it can be seen cheaply.

    It need not be exact: where it is too coarse, two threads may compile the same; too fine, one waits for another.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(size == 1 for size in value.shape)
    if isinstance(value, Mapping):
        return tuple((name, structure_of(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(structure_of(part) for part in value)
    if isinstance(value, Cache):
        return type(value), len(value.layers), value.is_initialized
    return value if isinstance(value, (bool, str)) else type(value)
