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
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.capture.twin import sharing_copy
from hawk_compile.compat.exporters import own_vision_attention
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting.components import Component, Shape
from hawk_compile.exporting.recording import REMEDY, recorded_calls
from hawk_compile.plan.ids import is_any

IMAGE_SIZES = re.compile("(grid|shape|size)s?(_|$)")
"""In the name of whole numbers that say how large images are, by which a module lays out their patches."""
MERGED = "merged_patches"
SIZES: dict[str, Shape] = {
    "segments": ("segments", "longest_segment"),
    "segment_places": ("patches",),
    "windows": ("windows", "longest_window"),
    "window_places": ("patches",),
    segments.WINDOW_INDEX: (MERGED,),
    segments.GRIDS: ("images", 3),
    segments.ENDS["segments"]: ("segments",),
    segments.ENDS["windows"]: ("windows",),
}
STANDARD_OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
"""Fields that every encoder's output has, so that a model can set them; others that it reads are None."""


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
            run = segments.run_plainly if segments.GRIDS in tensors else segments.run
            named = segments.named(run(self.child, self.fixed, tensors))
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
    if list(tensors) == [segments.WHOLE]:
        return tensors[segments.WHOLE]
    fields: dict[str, Any] = {}
    for name, value in tensors.items():
        whole, *place = name.split(".")
        if place:
            index, count = map(int, place)
            fields.setdefault(whole, [None] * count)[index] = value
        else:
            fields[whole] = value
    if fields.keys() == {segments.WHOLE}:
        return tuple(fields[segments.WHOLE])
    return output_class(tuple(dict.fromkeys((*STANDARD_OUTPUTS, *fields))))(**fields)


@functools.cache
def output_class(names: tuple[str, ...]) -> type[ModelOutput]:
    fields = [(name, Any, dataclasses.field(default=None)) for name in names]
    return dataclasses.make_dataclass(
        "EncoderOutput", fields, bases=(ModelOutput,), namespace={"__getattr__": missing_field}
    )


def missing_field(output: ModelOutput, name: str) -> None:
    """What an encoder left empty when it was exported."""
    if name.startswith("_"):
        raise AttributeError(name)


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
        sizes = [key for key, value in tensors.items() if key != segments.GRID and are_sizes(key, value)]
        if not tensors or sizes:
            reason = f"takes {sizes[0]}, which would be fixed in its graph" if sizes else "takes no tensor"
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be exported: its encoder's {name} {reason}; {REMEDY}"
            )
        fixed = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}
        if segments.GRID in tensors:
            component = packed_component(name, child, fixed, tensors, outputs, visual, type(model).__name__)
        else:
            sample = twice(tensors)
            encoder = Encoder(child, fixed, list(outputs))
            component = Component(name, encoder, sample, shapes_of(sample, False), torch.no_grad, visual=visual)
            if any(key.startswith(f"{segments.WHOLE}.") for key in outputs):
                check_tuple(component, type(model).__name__)
        components.append(component)
    return components


def packed_component(
    name: str, child: nn.Module, fixed: dict[str, Any], tensors: dict[str, Tensor], outputs: dict[str, Tensor],
    visual: int, model: str,
) -> Component:  # fmt: skip
    """A tower over packed patches: by indices alone, or with the sizes and bounds that it reads beside them."""
    reason = ""
    for plain in (False, True):
        sample = segments.prepared(child, twice(tensors), plain)
        copy = sharing_copy(child)
        segments.attend_by_segments(copy, plain)
        encoder = Encoder(copy, fixed if plain else {**fixed, segments.GRID: None}, list(outputs))
        component = Component(name, encoder, sample, shapes_of(sample, True), own_attention, visual=visual)
        reason = difference_from(component, outputs)
        if not reason:
            return component
    raise UnsupportedModelError(
        f"{model} cannot be exported: its encoder's {name} reads the sizes of images elsewhere than in its attention "
        f"and positions, which an index of patches cannot give it ({reason}); {REMEDY}"
    )


def check_tuple(component: Component, model: str) -> None:
    """Refuse a module that gives a tuple of as many tensors as there are images: of two such prompts others."""
    try:
        _ = component.results
    except KeyError:
        raise UnsupportedModelError(
            f"{model} cannot be exported: its encoder's {component.name} gives a tuple of as many tensors as there are "
            f"images, which a component cannot; {REMEDY}"
        ) from None


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of two such prompts, so that no size is one."""
    return {key: torch.cat([value, value]).detach() for key, value in tensors.items()}


def are_sizes(name: str, value: Tensor) -> bool:
    """Whether an encoder's argument says how large images are."""
    return not value.is_floating_point() and IMAGE_SIZES.search(name) is not None


def shapes_of(sample: dict[str, Tensor], by_grid: bool) -> dict[str, Shape]:
    """The symbolic shapes of an encoder's inputs, of which those that are no index run along patches or tiles.

    Args:
        by_grid: patches are packed, and what has another number of rows is a table of a fixed size. Elsewhere it is
            there once for each visual token, as indices of the tiles' patches that make it up.
    """
    first = next(iter(sample.values())).shape[0]
    others = {value.shape[0] for key, value in sample.items() if key not in SIZES} - {first}
    rows: dict[int, str] = {first: "patches" if by_grid else "tiles"}
    if len(others) == 1 and not by_grid:
        rows[others.pop()] = MERGED
    return {
        key: SIZES[key] if key in SIZES else (rows.get(value.shape[0], value.shape[0]), *value.shape[1:])
        for key, value in sample.items()
    }


def difference_from(component: Component, expected: dict[str, Tensor]) -> str:
    """How a tower's outputs differ from its own by the grid, or what it fails with; empty if they do not.

    Args:
        expected: its outputs for the first half of the component's sample.
    """
    try:
        return segments.difference(component.results, expected)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return str(error)
