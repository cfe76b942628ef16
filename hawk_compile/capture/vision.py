"""The vision encoder compiled: each module of the body that encodes (a tower, a projector) as a graph of its own.

What lies between the modules (splitting by images, packing of tiles) stays the model's own code, on the host. A graph
serves images of any sizes and any number: dimensions are symbolic, and what a tower over packed patches works out from
the images' sizes is worked out before, see `hawk_compile.capture.segments`. One image or one tile alone
may have a second graph, since Dynamo keeps sizes of 1 apart.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch._dynamo.exc import Unsupported, UserError
from transformers import PreTrainedModel

from hawk_compile.capture import segments as packed
from hawk_compile.capture.dynamo import capture_lock, capture_settings, compile_alone
from hawk_compile.capture.patches import install_recorders
from hawk_compile.errors import UnsupportedModelError


class CompiledVision:
    """The graphs of a model's encoder, made when they are first called."""

    def __init__(self, backend: str):
        self.backend = backend
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.checked: set[str] = set()

    @contextlib.contextmanager
    def encoding(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the modules of the model's body run compiled. Threads that encode so take turns; others that call the
        modules meanwhile run them compiled too."""
        base: Any = model.base_model
        decoder = base.get_decoder()
        children = {name: child for name, child in base.named_children() if child is not decoder}
        with capture_lock:
            before = {name: child.__dict__.get("forward") for name, child in children.items()}
            try:
                for name, child in children.items():
                    forward = before[name] or type(child).forward.__get__(child)
                    child.__dict__["forward"] = functools.partial(self.run, name, child, forward)
                yield
            finally:
                for name, child in children.items():
                    del child.__dict__["forward"]
                    if before[name] is not None:
                        child.__dict__["forward"] = before[name]

    def run(self, name: str, child: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of a module.

        Raises:
            UnsupportedModelError: it cannot be captured as one graph.
        """
        given = packed.flat(inspect.signature(forward).bind(*args, **kwargs))
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in given.items() if key not in tensors}
        try:
            with capture_lock, capture_settings():
                if packed.GRID not in tensors:
                    return self.graph(name, child)(forward, fixed, tensors)
                ready = packed.prepared(child, tensors)
                with packed.segmented(child):
                    found = self.graph(name, child)(forward, {**fixed, packed.GRID: None}, ready)
                self.check(name, found, forward, given)
                return found
        except (Unsupported, UserError) as error:
            raise refusal(name, str(error).splitlines()[0]) from error

    def graph(self, name: str, child: nn.Module) -> Callable[..., Any]:
        if name not in self.compiled:
            install_recorders(child)
            self.compiled[name] = compile_alone(packed.run, backend=self.backend, fullgraph=True)
        return self.compiled[name]

    def check(self, name: str, found: Any, forward: Callable[..., Any], given: dict[str, Any]) -> None:
        """See, the first time, that a tower gives the same by segments as by the grid, which it may read elsewhere."""
        if name in self.checked:
            return
        if reason := packed.difference(packed.named(found), packed.named(forward(**given))):
            raise refusal(name, reason)
        self.checked.add(name)


def refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"compile_vision: the encoder's {name} cannot be compiled as one graph for images of all sizes: leave "
        f"compile_vision out ({reason})"
    )
