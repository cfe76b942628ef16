"""The vision encoder as components: the modules that a model's `get_image_features` runs, and nothing of its Python.

Each direct child of the model's body that is called there (a tower, a projector) is exported by itself; what lies
between them (splitting by images, packing of tiles) runs on the host, by the model's own code, see `runner.py`.

Wrapped, because transformers' exporters or their targets need it:

- Towers over a packed row of patches (`grid_thw`) get their indices precomputed, and attend by them: see
  `hawk_compile.capture.segments`. What is exported is a copy that shares the tower's weights.
- Outputs that nobody reads (hidden states of all layers) are left out; which are read is found by autograd.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.features import LAYER_FEATURES, features_of
from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.capture.twin import sharing_copy
from hawk_compile.compat.exporters import own_vision_attention
from hawk_compile.compat.models import PREPARE_ENCODERS
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting.components import Component, Shape
from hawk_compile.plan.ids import is_any
from hawk_compile.runtime.overrides import original

IMAGE_SIZES = "image_sizes"
SIZES: dict[str, Shape] = {
    "segments": ("segments", "longest_segment"),
    "segment_places": ("patches",),
    "windows": ("windows", "longest_window"),
    "window_places": ("patches",),
    segments.WINDOW_INDEX: ("merged_patches",),
}
STANDARD_OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
"""Fields that every encoder's output has, so that a model can set them."""


class Encoder(nn.Module):
    """One child of the model's body, with its tensors as inputs and the outputs that are read by name.

    Args:
        fixed: arguments that are no tensors.
        outputs: names of outputs, as `segments.named` gives them; None for all.
    """

    def __init__(self, child: nn.Module, fixed: dict[str, Any], outputs: list[str] | None):
        super().__init__()
        self.child, self.fixed, self.outputs = child, fixed, outputs

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        with segments.SortedByScatter(tensors.get(segments.WINDOW_INDEX)):
            named = segments.named(segments.run(self.child, self.fixed, tensors))
        return {name: named[name] for name in self.outputs or named}


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """Let transformers' exporter leave a tower's attention as it is: its own needs images of one size.

    The table of what it replaces is the process's: hold the lock of exports.
    """
    with own_vision_attention(), torch.no_grad():
        yield


def unnamed(tensors: dict[str, Tensor]) -> Any:
    """The output that `segments.named` took apart; parts of a tuple that were left out are None."""
    if list(tensors) == ["features"]:
        return tensors["features"]
    fields: dict[str, Any] = {}
    for name, value in tensors.items():
        whole, *place = name.split(".")
        if place:
            index, count = map(int, place)
            fields.setdefault(whole, [None] * count)[index] = value
        else:
            fields[whole] = value
    return output_class(tuple(dict.fromkeys((*STANDARD_OUTPUTS, *fields))))(**fields)


@functools.cache
def output_class(names: tuple[str, ...]) -> type[ModelOutput]:
    fields = [(name, Any, dataclasses.field(default=None)) for name in names]
    return dataclasses.make_dataclass("EncoderOutput", fields, bases=(ModelOutput,))


def encoder_components(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Component]:
    """The components of the encoder that encodes these inputs, each named like the module of the model's body.

    Raises:
        UnsupportedModelError: an encoder whose module is called more than once, takes no tensor, or reads the sizes
            of images in a way that cannot be exported.
    """
    calls = recorded_calls(model, inputs)
    components = []
    placeholders = placeholder_ids(model)
    visual = 2 * int(is_any(inputs["input_ids"], tuple(placeholders)).sum())  # the sample is the inputs twice
    for name, (arguments, outputs) in calls.items():
        child = model.base_model.get_submodule(name)
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        if not tensors or IMAGE_SIZES in tensors:
            reason = f"takes {IMAGE_SIZES}, which would be fixed in its graph" if tensors else "takes no tensor"
            raise UnsupportedModelError(f"{type(model).__name__} cannot be exported: its encoder's {name} {reason}")
        fixed = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}
        sample = segments.prepared(child, {key: torch.cat([value, value]).detach() for key, value in tensors.items()})
        by_grid = segments.GRID in tensors
        rows = next(iter(sample.values())).shape[0]
        shapes: dict[str, Shape] = {
            key: SIZES.get(key) or (("patches" if by_grid else "tiles"), *value.shape[1:])
            if key in SIZES or value.shape[0] == rows else tuple(value.shape)
            for key, value in sample.items()
        }  # fmt: skip
        if by_grid:
            fixed[segments.GRID] = None
            child = sharing_copy(child)
            segments.attend_by_segments(child)
        encoder = Encoder(child, fixed, list(outputs))
        component = Component(
            name, encoder, sample, shapes, own_attention if by_grid else torch.no_grad, visual=visual
        )
        if by_grid:
            check_segments(component, outputs, type(model).__name__)
        components.append(component)
    return components


def check_segments(component: Component, expected: dict[str, Tensor], model: str) -> None:
    """Refuse a tower that gives something else by segments than by the grid, which it then reads elsewhere too.

    Args:
        expected: its outputs for the first half of the component's sample.
    """
    try:
        reason = segments.difference(component.results, expected)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error)
    if not reason:
        return
    raise UnsupportedModelError(
        f"{model} cannot be exported: its encoder's {component.name} reads the sizes of images elsewhere than in its "
        f"attention and positions, which an index of patches cannot give it ({reason})"
    )


def recorded_calls(
    model: PreTrainedModel, inputs: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Of each module of the body that encodes: its arguments by name, and those of its outputs that are read."""
    calls: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str, Tensor]] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in calls:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs {name} more than once to encode its images, which cannot be exported as "
                "one component: give inputs with images only"
            )
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        calls[name] = segments.flat(bound)

    def after(name: str, output: Any) -> None:
        results[name] = segments.named(output)
        for value in results[name].values():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_()

    handles = []
    for name, child in model.base_model.named_children():
        handles.append(
            child.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: before(name, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(child.register_forward_hook(lambda module, args, output, name=name: after(name, output)))
    try:
        with torch.enable_grad():
            # That of an optimised model may run the modules compiled.
            encode = original(model, PREPARE_ENCODERS)
            encoded = encode(dict(inputs))["mm_encoder_outputs"]
            total = sum(part.sum() for output in encoded.values() if output is not None for part in parts_of(output))
            tensors = [value for result in results.values() for value in result.values()]
            gradients = torch.autograd.grad(total, tensors, allow_unused=True)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    read = {id(value) for value, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
    return {
        name: (given, {key: value.detach() for key, value in results[name].items() if id(value) in read})
        for name, given in calls.items()
    }


def parts_of(output: ModelOutput) -> list[Tensor]:
    held = [features_of(output), *(output.get(LAYER_FEATURES) or [])]
    return [part for parts in held for part in ([parts] if isinstance(parts, Tensor) else parts)]
