"""The images of a call taken apart before an encoder, and its outputs put together as one.

    {pixel_values [P, D], image_grid_thw [n, 3]} -> n times {[P_i, D], [1, 3]}
    {pixel_values [n, C, H, W]}                  -> n times {[1, C, H, W]}

What is told more of its images (sizes, masks, paddings) stays together: what an encoder makes of that is its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hawk_compile.capture.features import FEATURES, LAYER_FEATURES, UNPOOLED, is_numbered

GRID = "grid"
"""In the name of an argument [n, 3] int64 that says of how many patches each image is."""
NOT_MERGED = ("hidden_states", "attentions")
"""What an encoder gives, if it is asked to, that no model merges."""
STACKED = 4
"""Dimensions of images that lie one behind another, at least."""


def apart(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of an encoder for each image alone; as they are, in a list of one, where that cannot be told."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    grids = [name for name, value in tensors.items() if GRID in name and is_grid(value)]
    pixels = [name for name, value in tensors.items() if value.is_floating_point()]
    if len(pixels) != 1 or len(tensors) != 1 + len(grids) or len(grids) > 1:
        return [arguments]
    values = tensors[pixels[0]]
    if not grids:
        if values.ndim < STACKED:
            return [arguments]
        return [{**arguments, pixels[0]: each} for each in values.split(1)] or [arguments]
    grid = tensors[grids[0]]
    patches = grid.prod(1).tolist()
    if not patches or sum(patches) != values.shape[0]:
        return [arguments]
    pairs = zip(values.split(patches), grid.split(1), strict=True)
    return [{**arguments, pixels[0]: some, grids[0]: one} for some, one in pairs]


def is_grid(value: Tensor) -> bool:
    return value.ndim == 2 and value.shape[1] == 3 and not value.is_floating_point()


def together(outputs: Sequence[Any]) -> Any:
    """An encoder's output for several images, of those for each alone; None where they cannot be put together."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if not all(isinstance(each, ModelOutput) and each.keys() == first.keys() for each in outputs):
        return None
    parts = {}
    for name in first:
        if name in NOT_MERGED:
            continue
        joined = joined_levels if name == LAYER_FEATURES else joined_values
        parts[name] = joined([each[name] for each in outputs])
        if parts[name] is None:
            return None
    return type(first)(**parts)


def joined_values(values: list[Any]) -> Any:
    """Entries of images one behind another, be they a tensor's or a list's; None of anything else."""
    first = values[0]
    if isinstance(first, Tensor):
        alike = {(each.ndim, each.shape[1:]) for each in values} if first.ndim else ()
        return torch.cat(values) if len(alike) == 1 else None
    if type(first) in (list, tuple):
        return type(first)(entry for each in values for entry in each)
    return None


def joined_levels(values: list[Any]) -> Any:
    """Features of each later layer, which may stand behind its number."""
    if not all(isinstance(each, (list, tuple)) and len(each) == len(values[0]) for each in values):
        return None
    levels = []
    for level in zip(*values, strict=True):
        numbered = is_numbered(level[0])
        features = joined_values([each[1] for each in level] if numbered else [*level])
        if features is None:
            return None
        levels.append((level[0][0], features) if numbered else features)
    return type(values[0])(levels)


def alike(found: Any, expected: Any) -> bool:
    """Whether two outputs hold the same, up to rounding."""
    if isinstance(expected, ModelOutput):
        named = [name for name in expected if name not in NOT_MERGED]
        same = isinstance(found, ModelOutput) and type(found) is type(expected)
        return same and [*found] == named and all(alike(found[name], expected[name]) for name in named)
    if isinstance(expected, (list, tuple)):
        same = type(found) is type(expected) and len(found) == len(expected)
        return same and all(map(alike, found, expected))
    if not isinstance(expected, Tensor):
        return type(found) is type(expected) and bool(found == expected)
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    largest = expected.abs().max().float()
    return bool((found - expected).abs().max().float() <= torch.finfo(expected.dtype).eps ** 0.5 * largest)


def merged_alone(output: Any) -> Any:
    """An encoder's output without what is read by no merge, which may be larger than what is."""
    if not isinstance(output, ModelOutput):
        return output
    unread = {*NOT_MERGED}
    hidden = output.get(UNPOOLED)
    if output.get(FEATURES) is not None and isinstance(hidden, Tensor) and hidden.ndim < 3:
        unread.add(UNPOOLED)  # of three dimensions, it tells how many images there were: see `images.parts_of`
    return type(output)(**{name: value for name, value in output.items() if name not in unread})
