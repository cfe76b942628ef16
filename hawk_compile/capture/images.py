"""What of a call's features is one image, where the settings ask that: a picture or a tile of one, a frame of a video.

It is what the model's encoder takes as one and hands on apart from others. Most hand on an entry for each. Some join
what they took: the tiles of a row of the prompt, the frames of a video; those are taken apart again by the encoder's
own hidden states and by the grids of the videos. What an encoder puts together itself, of tiles and ends of lines, by
sizes that it is given, stays one image.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.features import LAYER_FEATURES, UNPOOLED, features_of, field_of, of_layer
from hawk_compile.capture.modalities import encoder_of, merges_itself
from hawk_compile.errors import UnsupportedCallError

SIZES = re.compile("(grid|shape|size)s?(_|$)|^num_")
"""Arguments that tell an encoder of what its entries are made, so that it puts them together itself."""
MERGED = ("spatial_merge_size", "merge_size", "merge_kernel_size")
"""How many patches of a side a feature is of, or of both sides, in configs of encoders that are given grids."""


def images_apart(model: PreTrainedModel, outputs: dict[str, Any], frames: Tensor | None) -> dict[str, Any]:
    """The encoders' outputs with an entry of features for each image. `generate` hands on features alone, and repeats
    them for several sequences, so that this has to be known before.

    Args:
        outputs: by modality.
        frames: [videos, 3] int64, frames, height and width, where the model packs videos of several sizes; None
            elsewhere.

    Raises:
        UnsupportedCallError: nothing says which features are of one image.
    """
    apart = {}
    for modality, output in outputs.items():
        parts = None if output is None or merges_itself(model) else parts_of(model, modality, output, frames)
        apart[modality] = output if parts is None else split(output, parts)
    return apart


def parts_of(model: PreTrainedModel, modality: str, output: ModelOutput, frames: Tensor | None) -> list[int] | None:
    """Images in each entry of features; None where all are one already."""
    features = features_of(output)
    if isinstance(features, Tensor) and features.ndim < 3:
        return None
    sizes = sizes_of(features)
    if modality == "video" and frames is not None and not isinstance(features, Tensor) and len(sizes) == len(frames):
        return [frames_in(model, size, grid) for size, grid in zip(sizes, frames.tolist(), strict=True)]
    hidden = output.get(UNPOOLED)
    taken = hidden.shape[0] if isinstance(hidden, Tensor) and hidden.ndim > 2 else 0
    if taken <= sum(size > 0 for size in sizes) or puts_together(model, modality):
        return None
    each, rest = divmod(sum(sizes), taken)
    if rest or any(size % each for size in sizes):
        if isinstance(features, Tensor):  # of videos, with tokens between or behind their frames
            return None
        raise unknown(model, f"{taken} {modality}s encoded, which it joins with other features in {len(sizes)} entries")
    return [size // each for size in sizes]


def puts_together(model: PreTrainedModel, modality: str) -> bool:
    encode = encoder_of(model, modality)
    return encode is None or any(SIZES.search(name) for name in inspect.signature(encode).parameters)


def frames_in(model: PreTrainedModel, size: int, grid: Sequence[int]) -> int:
    """How many frames a video's features are of: fewer than its grid's where the encoder merges frames.

    Args:
        size: features of the video.
        grid: frames, height and width in patches.
    """
    times, height, width = grid
    found = next((each for name in MERGED if (each := getattr(vision_config(model), name, None)) is not None), None)
    if found is None:
        side = math.isqrt(times * height * width // size) if size else 0
        return times if size and size * side**2 == times * height * width else 1
    area = found**2 if isinstance(found, int) else math.prod(found)
    count, rest = divmod(size * area, height * width)
    return count if count and not rest and size % count == 0 else 1


def vision_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", None)


def split(output: ModelOutput, counts: list[int]) -> ModelOutput:
    """An encoder's output whose entries are cut into so many of equal length each; those of none are left out."""

    def cut(parts: Any) -> Any:
        if not isinstance(parts, Tensor):
            return [one for part, count in zip(parts, counts, strict=True) if count for one in part.chunk(count)]
        if parts.ndim < 3:  # features of a later layer, joined over all
            return parts
        return parts.reshape(sum(counts), -1, parts.shape[-1])

    changed = {field_of(output): cut(output[field_of(output)])} if field_of(output) != LAYER_FEATURES else {}
    if output.get(LAYER_FEATURES) is not None:
        changed[LAYER_FEATURES] = [of_layer(level, cut) for level in output[LAYER_FEATURES]]
    return dataclasses.replace(output, **changed)  # type: ignore[type-var]


def image_sizes(model: PreTrainedModel, outputs: dict[str, Any]) -> dict[str, list[int]]:
    """modality -> tokens of each image in the order of the prompts.

    Args:
        outputs: of `images_apart`.

    Raises:
        UnsupportedCallError: nothing says which features are of one image.
    """
    sizes = {}
    for modality, output in outputs.items():
        if output is None:
            continue
        features = features_of(output)
        if merges_itself(model):
            raise unknown(model, f"its {modality}s merged in the middle of its forward")
        sizes[modality] = sizes_of(features)
        if isinstance(features, Tensor) and len(sizes[modality]) > 1 and {*sizes[modality]} == {1}:
            raise unknown(model, f"{len(sizes[modality])} features of {modality}s, each by itself")
    return sizes


def sizes_of(features: Any) -> list[int]:
    """Tokens of each entry of features."""
    return [part.numel() // part.shape[-1] for part in features]


def unknown(model: PreTrainedModel, what: str) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"min_per_image, quota and normalize_per are of images, and {type(model).__name__} hands on {what}, so that "
        "nothing says which tokens are of one image: leave these settings out"
    )
