"""Which image gives a model a certain number of visual tokens, and its pixels as the model's processor lays them."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution

from hawk_compile.errors import UnsupportedModelError

MOST_ASPECT = 2
"""Images of patches are at most so much longer than wide."""
MOST_TILES = 12
"""Tiles that InternVL's processor cuts an image into, the thumbnail behind them apart."""


@dataclass(frozen=True)
class Picture:
    """An image for a model: how many visual tokens it gives, and its size in what the model counts (patches after
    merging; tiles; pixels)."""

    tokens: int
    size: tuple[int, int]


def picture(config: PreTrainedConfig, tokens: int) -> Picture:
    """The image whose number of visual tokens is nearest; of two, the one with fewer.

    Raises:
        UnsupportedModelError: a kind of model whose images are not known here.
    """
    return family(config)[0](config, tokens)


def pixels(config: PreTrainedConfig, image: Picture, rows: int) -> dict[str, Tensor]:
    """What the processor would give beside the ids for that image in each row: random fp32 pixels."""
    return family(config)[1](config, image, rows)


def family(config: PreTrainedConfig) -> tuple[Callable[..., Picture], Callable[..., dict[str, Tensor]]]:
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"bench makes images for {', '.join(FAMILIES)}, and this model is {config.model_type}: take a profile or a "
            "checkpoint of one of these"
        )
    return FAMILIES[config.model_type]


def nearest(candidates: list[Picture], tokens: int) -> Picture:
    return min(candidates, key=lambda each: (abs(each.tokens - tokens), each.tokens))


def patch_picture(config: PreTrainedConfig, tokens: int) -> Picture:
    """h x w patches after merging, h <= w <= MOST_ASPECT * h."""
    for distance in itertools.count():
        for count in (tokens - distance, tokens + distance):
            for height in range(math.isqrt(max(count, 0)), 0, -1):
                width = count // height
                if width > MOST_ASPECT * height:
                    break
                if width * height == count:
                    return Picture(count, (height, width))
    raise AssertionError("every square is a picture")


def patch_pixels(config: PreTrainedConfig, image: Picture, rows: int) -> dict[str, Tensor]:
    vision: Any = config.vision_config
    merge, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
    height, width = (merge * side for side in image.size)
    values = torch.randn(rows * height * width, channels * vision.temporal_patch_size * vision.patch_size**2)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]] * rows)}


def tile_picture(config: Any, tokens: int) -> Picture:
    """One tile, or several with a thumbnail behind them."""
    counts = [1, *range(3, MOST_TILES + 2)]
    return nearest([Picture(count * config.image_seq_length, (1, count)) for count in counts], tokens)


def tile_pixels(config: Any, image: Picture, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows * image.size[1], 3, *config.vision_config.image_size)}


def anyres_picture(config: Any, tokens: int) -> Picture:
    """The image as a whole, and tiles of it fitted into the best of a list of resolutions, without their padding."""
    side = config.vision_config.image_size
    most = max(max(size) for size in config.image_grid_pinpoints)
    lengths = range(side // 4, most + 1, side // 4)
    sizes = ((height, width) for height in lengths for width in lengths if height <= width)
    return nearest([Picture(anyres_tokens(config, size), size) for size in sizes], tokens)


def anyres_tokens(config: Any, size: tuple[int, int]) -> int:
    """Visual tokens of an image of (height, width) pixels: those of the whole, of the tiles, and one for each line."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    height, width = (side * tiles for tiles in anyres_grid(config, size))
    if size[1] / size[0] > width / height:
        height -= (height - int(round(size[0] * width / size[1], 7))) // 2 * 2
    else:
        width -= (width - int(round(size[1] * height / size[0], 7))) // 2 * 2
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    shrink = math.sqrt(height * width / (most * side**2))
    if shrink > 1.1:
        height, width = int(height // shrink), int(width // shrink)
    return side**2 + height * (width + 1)


def anyres_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tiles, down and across."""
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    return height // config.vision_config.image_size, width // config.vision_config.image_size


def anyres_pixels(config: Any, image: Picture, rows: int) -> dict[str, Tensor]:
    tiles, side = math.prod(anyres_grid(config, image.size)) + 1, config.vision_config.image_size
    return {
        "pixel_values": torch.randn(rows, tiles, 3, side, side),
        "image_sizes": torch.tensor([image.size] * rows),
        "batch_num_images": torch.ones(rows, dtype=torch.long),
    }


PATCHES = (patch_picture, patch_pixels)
FAMILIES: dict[str, tuple[Callable[..., Picture], Callable[..., dict[str, Tensor]]]] = {
    "qwen2_vl": PATCHES,
    "qwen2_5_vl": PATCHES,
    "qwen3_vl": PATCHES,
    "internvl": (tile_picture, tile_pixels),
    "llava_onevision": (anyres_picture, anyres_pixels),
}
