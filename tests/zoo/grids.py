"""Architectures whose number of visual tokens follows the image's own size.

The unit of an image size is the visual token: (h, w) gives V = h * w; a video (t, h, w) gives V = t * h * w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Mistral3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from . import common as c
from .common import Architecture, Row, Size

MERGE = 2  # patches per visual token, in each direction
FRAMES = 2  # frames per patch

QWEN_IDS: dict[str, Any] = {
    "image_token_id": c.IMAGE,
    "video_token_id": c.VIDEO,
    "vision_start_token_id": c.VISION_START,
    "vision_end_token_id": c.VISION_END,
}

SIZES = ((2, 2), (2, 3), (4, 4), (3, 5), (4, 6), (5, 4), (1, 7), (6, 6), (2, 9), (7, 3), (1, 1), (8, 8))


class Patches(Architecture):
    """Qwen2-VL's inputs: patches flattened over all images, and a (t, h, w) grid of patches for each image."""

    image_sizes = SIZES
    video_sizes = ((2, 2, 3), (3, 2, 2), (4, 3, 4))

    def vision_config(self) -> dict:
        return {
            "depth": c.VISION_LAYERS,
            "num_heads": c.VISION_HEADS,
            "patch_size": c.PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
        }

    def image_ids(self, size: Size, count: int) -> list[int]:
        return [c.VISION_START, *[c.IMAGE] * (size[0] * size[1]), c.VISION_END]

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        return [c.VISION_START, *[c.VIDEO] * (size[0] * size[1] * size[2]), c.VISION_END]

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """0 for text, 1 for an image's placeholders, 2 for a video's."""
        return {"mm_token_type_ids": (input_ids == c.IMAGE).long() + 2 * (input_ids == c.VIDEO).long()}

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        images = [(1, h * MERGE, w * MERGE) for row in rows for h, w in row.images]
        videos = [(t, h * MERGE, w * MERGE) for row in rows if row.video for t, h, w in [row.video]]
        result = {}
        for grids, pixels, grid_name in (
            (images, "pixel_values", "image_grid_thw"),
            (videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if grids:
                count = sum(t * h * w for t, h, w in grids)
                result[pixels] = torch.randn(count, 3 * FRAMES * c.PATCH**2, generator=generator)
                result[grid_name] = torch.tensor(grids)
        return result


class Qwen2VL(Patches):
    name = "qwen2_vl"
    end_ids = (c.END_OF_TURN, c.EOS)

    def config(self, layers: int) -> PreTrainedConfig:
        return Qwen2VLConfig(
            text_config=c.text_config(layers, rope_parameters=mrope([2, 3, 3])),
            vision_config=self.vision_config() | {"embed_dim": c.VISION_WIDTH, "hidden_size": c.WIDTH, "mlp_ratio": 2},
            **QWEN_IDS,
        )


class Qwen25VL(Patches):
    name = "qwen2_5_vl"
    end_ids = (c.END_OF_TURN, c.EOS)

    def config(self, layers: int) -> PreTrainedConfig:
        vision = self.vision_config() | {
            "hidden_size": c.VISION_WIDTH,
            "intermediate_size": 48,
            "out_hidden_size": c.WIDTH,
            "window_size": 2 * MERGE * c.PATCH,  # pixels: windows of 2 x 2 visual tokens
            "fullatt_block_indexes": [c.VISION_LAYERS - 1],
            "tokens_per_second": 2,
        }
        return Qwen2_5_VLConfig(
            text_config=c.text_config(layers, rope_parameters=mrope([2, 3, 3])),
            vision_config=vision,
            **QWEN_IDS,
        )

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        result = super().pixels(rows, generator)
        if "video_grid_thw" in result:
            result["second_per_grid_ts"] = torch.ones(len(result["video_grid_thw"]))
        return result


class Qwen3VL(Patches):
    """Deepstack: features of the first vision layers are added to the visual tokens after the first decoder layers."""

    name = "qwen3_vl"
    end_ids = (c.END_OF_TURN, c.EOS)

    def config(self, layers: int) -> PreTrainedConfig:
        vision = self.vision_config() | {
            "hidden_size": c.VISION_WIDTH,
            "intermediate_size": 48,
            "out_hidden_size": c.WIDTH,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": list(range(min(layers, c.VISION_LAYERS))),
        }
        rope = mrope([4, 2, 2]) | {"mrope_interleaved": True}
        return Qwen3VLConfig(
            text_config=c.text_config(layers, head_dim=c.HEAD_DIM, rope_parameters=rope),
            vision_config=vision,
            **QWEN_IDS,
        )

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        """Each frame (after temporal merging) has a timestamp in front and its own vision start and end."""
        frames, h, w = size
        ids = []
        for frame in range(frames):
            ids += [c.FIRST_TEXT + frame, c.VISION_START, *[c.VIDEO] * (h * w), c.VISION_END]
        return ids


class Glm4v(Patches):
    """Image and video share one placeholder id, so the model takes images or videos in a batch, not both."""

    name = "glm4v"

    def config(self, layers: int) -> PreTrainedConfig:
        vision = self.vision_config() | {
            "hidden_size": c.VISION_WIDTH,
            "intermediate_size": 48,
            "out_hidden_size": c.WIDTH,
            "image_size": 8 * c.PATCH,
        }
        rope = mrope([1, 1, 2]) | {"partial_rotary_factor": 0.5}
        return Glm4vConfig(
            text_config=c.text_config(layers, rope_parameters=rope),
            vision_config=vision,
            image_token_id=c.IMAGE,
            video_token_id=c.VIDEO,
            image_start_token_id=c.VISION_START,
            image_end_token_id=c.VISION_END,
            video_start_token_id=c.VIDEO_START,
            video_end_token_id=c.VIDEO_END,
        )

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        """Frames between the video's start and end, each followed by its timestamp."""
        frames, h, w = size
        ids = [c.VIDEO_START]
        for frame in range(frames):
            ids += [*self.image_ids((h, w), 1), c.FIRST_TEXT + frame]
        return [*ids, c.VIDEO_END]

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        image = (input_ids == c.IMAGE).long()
        in_video = (input_ids == c.VIDEO_START).cumsum(1) > (input_ids == c.VIDEO_END).cumsum(1)
        return {"mm_token_type_ids": image + image * in_video}

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        if any(row.images for row in rows) and any(row.video for row in rows):
            raise ValueError(f"{self.name} takes images or videos in a batch, not both: got {list(rows)}")
        return super().pixels(rows, generator)


class Mistral3(Architecture):
    """Pixtral's tower: images padded to the largest; every row of visual tokens ends with a break id."""

    name = "mistral3"
    image_sizes = tuple(size for size in SIZES if size != (1, 1))  # get_image_features squeezes one token's row away

    def config(self, layers: int) -> PreTrainedConfig:
        return Mistral3Config(
            text_config=c.text_config(layers, model_type="mistral", head_dim=c.HEAD_DIM, sliding_window=None),
            vision_config=c.tower_config("pixtral", 16 * c.PATCH),
            image_token_index=c.IMAGE,
            spatial_merge_size=MERGE,
            tie_word_embeddings=False,
        )

    def image_ids(self, size: Size, count: int) -> list[int]:
        h, w = size
        ids = ([c.IMAGE] * w + [c.ROW_BREAK]) * h
        return [*ids[:-1], c.VISION_END]

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        scale = MERGE * c.PATCH
        image_sizes = torch.tensor([(h * scale, w * scale) for row in rows for h, w in row.images])
        height, width = image_sizes.max(0).values.tolist()
        pixel_values = torch.randn(len(image_sizes), 3, height, width, generator=generator)
        for image, (h, w) in zip(pixel_values, image_sizes.tolist(), strict=True):
            image[:, h:] = 0
            image[:, :, w:] = 0
        return {"pixel_values": pixel_values, "image_sizes": image_sizes}


def mrope(section: list[int]) -> dict:
    """Frequencies of the temporal, height and width positions; they add up to half the rotated dimensions of a head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
