"""Which modules of a model's body encode a prompt, with what, and what of them is read."""

import inspect
import itertools
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import LAYER_FEATURES, features_of, field_of, of_level
from hawk_compile.capture.modalities import modalities_of
from hawk_compile.compat.dynamo import tree_leaves
from hawk_compile.compat.models import PREPARE_ENCODERS
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.runtime.originals import original
from hawk_compile.runtime.positions import deltas_kept

Call = tuple[dict[str, Any], dict[str, Tensor]]
"""Arguments of a module's first call by name, and the tensors of its output that are read."""

REMEDY = "run the model with hawk_compile.optimize"


class Recording(TorchFunctionMode):
    """What happens while a model encodes.

    Attributes:
        arguments: of each module's first call, by name.
        results: of all its calls, the tensors of their outputs by name.
        outside: the first weight that was used while none of the modules ran.
    """

    def __init__(self, model: PreTrainedModel, modalities: set[str]):
        super().__init__()
        self.model, self.modalities = model, modalities
        self.arguments: dict[str, dict[str, Any]] = {}
        self.results: dict[str, list[dict[str, Tensor]]] = {}
        self.outside: str | None = None
        self.running = 0
        body: Any = model.base_model
        own = {id(value) for value in body.parameters(recurse=False)}
        named = itertools.chain(body.named_parameters(), body.named_buffers())
        self.weights = {id(value): name for name, value in named if id(value) not in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.running and self.outside is None and isinstance(result, Tensor):
            leaves = tree_leaves((args, kwargs or {}))
            self.outside = next((self.weights[id(each)] for each in leaves if id(each) in self.weights), None)
        return result

    def before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running += 1
        given = segments.flat(inspect.signature(module.forward).bind(*args, **kwargs))
        if not alike(given, first := self.arguments.setdefault(name, given)):
            one = "" if len(self.modalities) < 2 else "give inputs with one modality only, or "
            kinds = [", ".join(f"{key}: {kind}" for key, kind in structure(each).items()) for each in (first, given)]
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be exported: it runs {name} more than once to encode, with "
                f"{kinds[0]} and with {kinds[1]}, which one component does not take; {one}{REMEDY}"
            )

    def after(self, name: str, output: Any) -> None:
        self.running -= 1
        if not isinstance(output, (Tensor, ModelOutput, tuple)):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be exported: its encoder's {name} gives a {type(output).__name__} "
                f"of as many tensors as there are images, which a component cannot; {REMEDY}"
            )
        fields = output if isinstance(output, ModelOutput) else {}
        others = [key for key, value in fields.items() if not isinstance(value, (Tensor, tuple, list))]
        if others:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be exported: its encoder's {name} gives {' and '.join(others)}, "
                f"which is no tensor that a component could hand on; {REMEDY}"
            )
        named = segments.named(output)
        self.results.setdefault(name, []).append(named)
        for value in named.values():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_()


def alike(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return structure(left) == structure(right)


def structure(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a graph is made for: of tensors all sizes but the first."""
    return {
        name: f"[*, {', '.join(map(str, value.shape[1:]))}]" if isinstance(value, Tensor) else repr(value)
        for name, value in arguments.items()
    }  # fmt: skip


def recorded_calls(model: PreTrainedModel, inputs: dict[str, Any], opened: Set[str]) -> dict[str, Call]:
    """Of each module of the body that encodes: its arguments by name, and those of its outputs that are read.

    Args:
        opened: modules in the place of which those in them are recorded.

    Raises:
        UnsupportedModelError: an encoder that is more than calls of its modules.
    """
    recording, encoded = recorded(model, inputs, opened)
    while holder := bypassed(recording, model.base_model, opened):
        opened = {*opened, holder}
        recording, encoded = recorded(model, inputs, opened)
    if recording.outside is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported: to encode, it uses {recording.outside} otherwise than by the "
            f"forward of a module, which is what a component is made of; {REMEDY}"
        )
    read = read_of(encoded, [result for results in recording.results.values() for result in results])
    first = {name: results[0] for name, results in recording.results.items()}
    keys = {
        name: {key for result in results for key, value in result.items() if id(value) in read}
        for name, results in recording.results.items()
    }
    return {
        name: (given, {key: value.detach() for key, value in first[name].items() if key in keys[name]})
        for name, given in recording.arguments.items()
    }


def recorded(
    model: PreTrainedModel, inputs: dict[str, Any], opened: Set[str]
) -> tuple[Recording, dict[str, ModelOutput | None]]:
    """What happens while a model encodes, and what it makes.

    Args:
        opened: children of the body by name, in the place of which their own children are recorded.
    """
    recording, handles = Recording(model, modalities_of(model, inputs)), []
    for name, child in callable_children(model.base_model, opened):
        handles.append(
            child.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: recording.before(name, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            child.register_forward_hook(lambda module, args, output, name=name: recording.after(name, output))
        )
    try:
        with torch.enable_grad(), deltas_kept(model), recording:
            # That of an optimised model may run the modules compiled.
            encoded = run_encoders(model, dict(inputs), original(model, PREPARE_ENCODERS))["mm_encoder_outputs"]
    finally:
        for handle in handles:
            handle.remove()
    return recording, encoded


def bypassed(recording: Recording, body: nn.Module, opened: Set[str]) -> str | None:
    """The module of which a weight was used, but never the forward: another method of it runs the modules in it."""
    outside = recording.outside or ""
    return next((
        name for name, child in callable_children(body, opened)
        if outside.startswith(f"{name}.") and name not in recording.arguments and any(child.children())
    ), None)  # fmt: skip


def read_of(encoded: dict[str, ModelOutput | None], results: list[dict[str, Tensor]]) -> set[int]:
    """The ids of those tensors from which encoded features were made, found by their gradients.

    Whole numbers have none, and are all among them.
    """
    with torch.enable_grad():
        total: Any = sum(part.sum() for output in encoded.values() if output is not None for part in parts_of(output))
        tensors = [value for result in results for value in result.values() if value.requires_grad]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    whole = {id(value) for result in results for value in result.values() if not value.is_floating_point()}
    return whole | {id(value) for value, gradient in zip(tensors, gradients, strict=True) if gradient is not None}


def callable_children(body: nn.Module, opened: Set[str], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The direct children of a body by name; in the place of a list or dict of modules, or one opened, those in it."""
    for name, child in body.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or f"{prefix}{name}" in opened:
            yield from callable_children(child, opened, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def parts_of(output: ModelOutput) -> list[Tensor]:
    held = [of_level(level) for level in output.get(LAYER_FEATURES) or []]
    if field_of(output) != LAYER_FEATURES:
        held.append(features_of(output))
    return [part for parts in held for part in ([parts] if isinstance(parts, Tensor) else parts)]
