"""One module of an encoder as a component: its forward on tensors by name, and the outputs of it that are read.

Wrapped, because transformers' exporters or their targets need it:

- Towers over a packed row of patches (`grid_thw`) get their indices precomputed, and attend by them: see
  `hawk_compile.capture.segments`. What is exported is a copy that shares the tower's weights.
- Outputs that nobody reads (hidden states of all layers) are left out.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.twin import sharing_copy
from hawk_compile.compat.exporters import own_vision_attention
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting import bounds
from hawk_compile.exporting.components import Component, Shape
from hawk_compile.exporting.recording import REMEDY, Call

MERGED = "merged_patches"
SIZES: dict[str, Shape] = {
    "segments": ("segments", "longest_segment"),
    "segment_places": ("patches",),
    "windows": ("windows", "longest_window"),
    "window_places": ("patches",),
    segments.WINDOW_INDEX: (MERGED,),
    bounds.GRIDS: ("images", 3),
    bounds.ENDS["segments"]: ("segments",),
    bounds.ENDS["windows"]: ("windows",),
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
            run = bounds.run if bounds.are_prepared(tensors) else segments.run
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


def component_of_tiles(name: str, child: nn.Module, call: Call, visual: int, model: str) -> Component:
    """A module that takes as much of every image."""
    tensors, fixed = apart(call)
    sample = bounds.prepared(child, twice(tensors, {}))
    within_bounds = bounds.has_bounds(child)
    if within_bounds:
        child = sharing_copy(child)
        bounds.attend_within_bounds(child)
    encoder = Encoder(child, fixed, list(call[1]))
    component = Component(name, encoder, sample, shapes_of_tiles(sample), own_attention, visual=visual)
    if any(key.startswith(f"{segments.WHOLE}.") for key in call[1]):
        check_tuple(component, model)
    if within_bounds and (reason := difference_from(component, call[1])):
        raise UnsupportedModelError(
            f"{model} cannot be exported: its encoder's {name} gives something else where its attention is within the "
            f"bounds of a mask ({reason}); {REMEDY}"
        )
    return component


def packed_component(name: str, child: nn.Module, call: Call, visual: int) -> Component | None:
    """A tower over packed patches, by indices alone; None if it gives something else by them."""
    component = component_of_patches(name, child, call, visual, with_sizes=False)
    return None if difference_from(component, call[1]) else component


def component_with_sizes(name: str, child: nn.Module, call: Call, visual: int, model: str) -> Component:
    """A tower over packed patches, with the sizes of images and the ends of segments beside the indices."""
    component = component_of_patches(name, child, call, visual, with_sizes=True)
    if reason := difference_from(component, call[1]):
        raise UnsupportedModelError(
            f"{model} cannot be exported: its encoder's {name} reads the sizes of images elsewhere than in its "
            f"attention and positions, which an index of patches cannot give it ({reason}); {REMEDY}"
        )
    return component


def component_of_patches(name: str, child: nn.Module, call: Call, visual: int, with_sizes: bool) -> Component:
    tensors, fixed = apart(call)
    patches = int(tensors[segments.GRID].prod(-1).sum())
    # A tower may want its row of patches in a batch of one.
    along = {key: 1 if value.shape[:2] == (1, patches) else 0 for key, value in tensors.items()}
    sample = (bounds if with_sizes else segments).prepared(child, twice(tensors, along))
    shapes = {key: SIZES.get(key) or named_size(value, 2 * patches, along.get(key, 0)) for key, value in sample.items()}
    copy = sharing_copy(child)
    if with_sizes:
        bounds.attend_within_bounds(copy)
    else:
        segments.attend_by_segments(copy)
        fixed[segments.GRID] = None
    encoder = Encoder(copy, fixed, list(call[1]))
    return Component(name, encoder, sample, shapes, own_attention, visual=visual)


def named_size(value: Tensor, patches: int, dim: int) -> Shape:
    """The shape of an input that runs along patches; one of another size is a table of a fixed one."""
    return tuple("patches" if each == dim and size == patches else size for each, size in enumerate(value.shape))


def apart(call: Call) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments of a call that are tensors, and the others."""
    given = call[0]
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in given.items() if key not in tensors}


def check_tuple(component: Component, model: str) -> None:
    """Refuse a module that gives a tuple of as many tensors as there are images: of two such prompts others."""
    try:
        _ = component.results
    except KeyError:
        raise UnsupportedModelError(
            f"{model} cannot be exported: its encoder's {component.name} gives a tuple of as many tensors as there are "
            f"images, which a component cannot; {REMEDY}"
        ) from None


def twice(tensors: dict[str, Tensor], along: dict[str, int]) -> dict[str, Tensor]:
    """Of two such prompts, so that no size is one.

    Args:
        along: the dimension of each in which rows lie; 0 where it says nothing.
    """
    return {key: torch.cat([value, value], along.get(key, 0)).detach() for key, value in tensors.items()}


def shapes_of_tiles(sample: dict[str, Tensor]) -> dict[str, Shape]:
    """The symbolic shapes of inputs that run along tiles.

    What has another number of rows is there once for each visual token, as indices of the patches that make it up.
    """
    first = next(iter(sample.values())).shape[0]
    others = {value.shape[0] for key, value in sample.items() if key not in SIZES} - {first}
    rows: dict[int, str] = {first: "tiles"}
    if len(others) == 1:
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
    except (UnsupportedModelError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return str(error)
