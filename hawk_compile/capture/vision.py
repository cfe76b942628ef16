"""The vision encoder compiled: each module of the body that encodes (a tower, a projector) as a graph of its own.

What lies between the modules (splitting by images, packing of tiles) stays the model's own code, on the host. It runs
on a twin of the model whose modules run compiled; the model itself is not touched, so nothing is locked while an
encoder runs. The twin shares the model's tensors, and is made again when the model's modules are not what they were.

A graph serves images of any sizes and any number: dimensions are symbolic, and what a tower over packed patches works
out from the images' sizes is worked out before, see `hawk_compile.capture.segments`. One image or one tile alone
may have a second graph, since Dynamo keeps sizes of 1 apart.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hawk_compile.capture import segments
from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.hooks import refuse_hooks
from hawk_compile.capture.patches import install_recorders
from hawk_compile.capture.turns import CompiledInTurns
from hawk_compile.capture.twin import sharing_copy, snapshot, unchanged, with_children
from hawk_compile.errors import UnsupportedModelError

REMEDY = "leave compile_vision out"


class CompiledVision:
    """The compiled modules of one model's encoder, made when they are first called."""

    def __init__(self, backend: str):
        self.backend = backend
        self.modules: dict[str, CompiledModule] = {}
        self.lock = threading.Lock()
        """Guards `modules`."""

    def method(self, model: PreTrainedModel, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the model that encodes, run on its twin.

        Raises:
            UnsupportedModelError: it is no method any more, so that it cannot run on another model.
        """
        if not inspect.ismethod(method):
            raise UnsupportedModelError(
                f"compile_vision: what encodes the images of {type(model).__name__} has been replaced by {method!r}, "
                f"which is no method: {REMEDY}"
            )
        return types.MethodType(method.__func__, self.twin(model))

    def twin(self, model: PreTrainedModel) -> Any:
        """The model with an encoder that runs compiled. It is made for one call: it holds what the model holds now."""
        base: Any = model.base_model
        decoder = base.get_decoder()
        children = {name: child for name, child in base.named_children() if child is not decoder}
        body = with_children(base, {name: self.compiled(name, child).module for name, child in children.items()})
        if base is model:
            return body
        return with_children(model, {name: body for name, child in model.named_children() if child is base})

    def compiled(self, name: str, child: nn.Module) -> "CompiledModule":
        with self.lock:
            known = self.modules.get(name)
            if known is None or not known.is_of(child):
                known = self.modules[name] = CompiledModule(name, child, self.backend)
            return known


class CompiledModule:
    """One module that encodes, and a copy of it whose forward runs compiled.

    Attributes:
        module: the copy.
    """

    def __init__(self, name: str, original: nn.Module, backend: str):
        install_recorders(original)
        self.name, self.original = name, original
        self.held = snapshot(original)
        self.module = sharing_copy(original)
        self.eager: Callable[..., Any] = self.module.forward
        self.module.__dict__["forward"] = functools.partial(self.run, inspect.signature(self.eager))
        self.graph = CompiledInTurns(segments.run, backend=backend, fullgraph=True)
        self.checked = False

    def is_of(self, module: nn.Module) -> bool:
        """Whether this still is a module's copy."""
        return module is self.original and unchanged(module, self.held)

    def run(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Any:
        """One call of the module.

        Raises:
            CaptureError: it cannot be captured as one graph.
            UnsupportedModelError: it reads the sizes of images where no index can give them.
        """
        given = segments.flat(signature.bind(*args, **kwargs))
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in given.items() if key not in tensors}
        if segments.GRID not in tensors:
            return self.compiled(fixed, tensors)
        if not self.checked:
            segments.attend_by_segments(self.module)
        with torch.no_grad():
            output = self.compiled({**fixed, segments.GRID: None}, segments.prepared(self.original, tensors))
            self.check(output, given)
        return output

    def compiled(self, fixed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        what = f"compile_vision: the encoder's {self.name}"
        inside = ((path, part) for path, part in self.original.named_modules(prefix=self.name) if path != self.name)
        check = functools.partial(refuse_hooks, inside, what, REMEDY)
        with diagnosed(self.module, what, REMEDY):
            return self.graph.call(check, self.eager, fixed, tensors)

    def check(self, output: Any, given: dict[str, Any]) -> None:
        """See, the first time, that a tower gives the same by segments as by the grid, which it may read elsewhere."""
        if self.checked:
            return
        if reason := segments.difference(segments.named(output), segments.named(self.original.forward(**given))):
            raise UnsupportedModelError(
                f"compile_vision: the encoder's {self.name} reads the sizes of images elsewhere than in its attention "
                f"and positions, which one graph for images of all sizes cannot give it ({reason}): {REMEDY}"
            )
        self.checked = True
