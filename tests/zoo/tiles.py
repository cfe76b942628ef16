"""Architectures that cut an image into tiles of one size: V = the number of tiles times a constant, plus separators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    InternVLConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    SmolVLMConfig,
)
from transformers.image_processing_utils import select_best_resolution

from . import common as c
from .common import Architecture, Row, Size

TILE_GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2), (1, 4))


class AnyResolution(Architecture):
    """LLaVA-NeXT: the whole image once, and tiles of the image fitted into the best of a list of resolutions.

    The unit of an image size is the pixel. The fitted image's padding is cut off in feature space, and each of its
    feature rows ends with a newline feature, which has a placeholder like any other.
    """

    image_sizes = (
        (16, 16),
        (16, 30),
        (30, 16),
        (20, 20),
        (32, 32),
        (10, 32),
        (32, 10),
        (48, 15),
        (15, 48),
        (28, 31),
        (12, 40),
        (40, 9),
    )
    tile = 4 * c.PATCH  # pixels
    side = 4  # features per side of a tile
    resolutions: tuple[Size, ...]  # pixels

    def anyres_config(self) -> dict:
        return {"image_token_index": c.IMAGE, "image_grid_pinpoints": [list(size) for size in self.resolutions]}

    def grid(self, size: Size) -> Size:
        """Tiles (rows, columns) of the best resolution."""
        height, width = select_best_resolution(size, self.resolutions)
        return height // self.tile, width // self.tile

    def unpadded(self, size: Size) -> Size:
        """Features (rows, columns) of the fitted image that are not padding."""
        height, width = (self.side * tiles for tiles in self.grid(size))
        if size[1] / size[0] > width / height:
            height -= (height - int(round(size[0] * width / size[1], 7))) // 2 * 2
        else:
            width -= (width - int(round(size[1] * height / size[0], 7))) // 2 * 2
        return height, width

    def image_ids(self, size: Size, count: int) -> list[int]:
        height, width = self.unpadded(size)
        return [c.IMAGE] * (self.side**2 + height * (width + 1))

    def tiles_of(self, size: Size, count: int) -> int:
        rows, columns = self.grid(size)
        return rows * columns + 1

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        images = [(size, self.tiles_of(size, len(row.images))) for row in rows for size in row.images]
        if not images:
            return {}
        most = max(tiles for _, tiles in images)
        pixel_values = torch.randn(len(images), most, 3, self.tile, self.tile, generator=generator)
        for image, (_, tiles) in zip(pixel_values, images, strict=True):
            image[tiles:] = 0
        return {"pixel_values": pixel_values, "image_sizes": torch.tensor([size for size, _ in images])}


class LlavaNext(AnyResolution):
    """CLIP tower, Mistral decoder."""

    name = "llava_next"
    resolutions = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))

    def config(self, layers: int) -> PreTrainedConfig:
        return LlavaNextConfig(
            text_config=c.text_config(layers, model_type="mistral", sliding_window=None),
            vision_config=c.tower_config("clip_vision_model", self.tile, projection_dim=c.VISION_WIDTH),
            image_seq_length=self.side**2,
            **self.anyres_config(),
        )


class LlavaOnevision(AnyResolution):
    """SigLIP tower, Qwen2 decoder.

    Only the image of a one-image row is cut into tiles; large ones are scaled down to MOST tiles in feature space.
    """

    name = "llava_onevision"
    resolutions = tuple((16 * rows, 16 * columns) for rows in range(1, 5) for columns in range(1, 5))
    image_sizes = (*AnyResolution.image_sizes, (64, 60), (60, 40))
    video_sizes = ((2, 1, 1), (3, 1, 1), (5, 1, 1))  # frames; a frame has one size
    MOST = 4

    def config(self, layers: int) -> PreTrainedConfig:
        return LlavaOnevisionConfig(
            text_config=c.text_config(layers, model_type="qwen2"),
            vision_config=c.tower_config("siglip_vision_model", self.tile, vision_use_head=False),
            video_token_index=c.VIDEO,
            vision_aspect_ratio=f"anyres_max_{self.MOST}",
            **self.anyres_config(),
        )

    def unpadded(self, size: Size) -> Size:
        height, width = super().unpadded(size)
        ratio = math.sqrt(height * width / (self.MOST * self.side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)

    def image_ids(self, size: Size, count: int) -> list[int]:
        return super().image_ids(size, count) if count == 1 else [c.IMAGE] * (self.side**2 + 1)

    def tiles_of(self, size: Size, count: int) -> int:
        return super().tiles_of(size, count) if count == 1 else 1

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        """Features of a frame are pooled two by two; one newline feature ends the video."""
        return [c.VIDEO] * (size[0] * (self.side // 2) ** 2 + 1)

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        result = super().pixels(rows, generator)
        if result:
            result["batch_num_images"] = torch.tensor([len(row.images) for row in rows])
        frames = [row.video[0] for row in rows if row.video]
        if frames:
            if len(set(frames)) > 1:
                raise ValueError(f"the videos of a batch have equally many frames in {self.name}, got {frames}")
            shape = (len(frames), frames[0], 3, self.tile, self.tile)
            result["pixel_values_videos"] = torch.randn(shape, generator=generator)
        return result


class InternVL(Architecture):
    """InternViT tower, Qwen2 decoder.

    The unit of an image size is the tile; several tiles are followed by a thumbnail.
    """

    name = "internvl"
    image_sizes = TILE_GRIDS
    video_sizes = ((2, 1, 1), (3, 1, 1), (5, 1, 1))  # frames; a frame is one tile
    tile = 6 * c.PATCH  # pixels
    visual = 9  # visual tokens per tile

    def config(self, layers: int) -> PreTrainedConfig:
        vision = c.tower_config("internvl_vision", self.tile)
        return InternVLConfig(
            text_config=c.text_config(layers, model_type="qwen2"),
            vision_config=vision | {"image_size": [self.tile] * 2, "patch_size": [c.PATCH] * 2},
            image_token_id=c.IMAGE,
            image_seq_length=self.visual,
            tie_word_embeddings=False,
        )

    def tiles_of(self, size: Size) -> int:
        tiles = size[0] * size[1]
        return tiles if tiles == 1 else tiles + 1

    def image_ids(self, size: Size, count: int) -> list[int]:
        return [c.VISION_START, *[c.IMAGE] * (self.visual * self.tiles_of(size)), c.VISION_END]

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        """Lines "FrameN: <image>" of two text tokens and an image."""
        ids = []
        for frame in range(size[0]):
            ids += [c.NEWLINE] if frame else []
            ids += [c.FIRST_TEXT, c.FIRST_TEXT + 1 + frame, *self.image_ids((1, 1), 1)]
        return ids

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        tiles = sum(sum(map(self.tiles_of, row.images)) + (row.video[0] if row.video else 0) for row in rows)
        return {"pixel_values": torch.randn(tiles, 3, self.tile, self.tile, generator=generator)}


class Idefics3(Architecture):
    """SigLIP-like tower, Llama decoder.

    The unit of an image size is the tile; several tiles are followed by the whole image. A row's tiles lie along one
    dimension of pixel_values [B, tiles, 3, H, W], padded with zeros.
    """

    name = "idefics3"
    end_ids = (c.EOS, c.END_OF_TURN)
    config_class: type[PreTrainedConfig] = Idefics3Config
    image_sizes = TILE_GRIDS
    tile = 6 * c.PATCH  # pixels
    visual = 9  # visual tokens per tile

    def config(self, layers: int) -> PreTrainedConfig:
        vision = c.tower_config("", self.tile)
        vision.pop("model_type")
        return self.config_class(
            text_config=c.text_config(layers, model_type="llama"),
            vision_config=vision,
            image_token_id=c.IMAGE,
            pad_token_id=c.PAD,
            scale_factor=2,
        )

    def tiles_of(self, size: Size) -> int:
        tiles = size[0] * size[1]
        return tiles if tiles == 1 else tiles + 1

    def image_ids(self, size: Size, count: int) -> list[int]:
        if max(size) > c.TILES:
            raise ValueError(f"{self.name} has tags for {c.TILES} x {c.TILES} tiles, got {size}")
        ids = []
        if size != (1, 1):
            for row in range(size[0]):
                for column in range(size[1]):
                    tag = c.TILE_TAG + row * c.TILES + column
                    ids += [c.AROUND_IMAGE, tag, *[c.IMAGE] * self.visual]
                ids.append(c.NEWLINE)
            ids.append(c.NEWLINE)
        return [*ids, c.AROUND_IMAGE, c.GLOBAL_IMAGE, *[c.IMAGE] * self.visual, c.AROUND_IMAGE]

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        counts = [sum(map(self.tiles_of, row.images)) + (row.video[0] if row.video else 0) for row in rows]
        real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # [B, tiles]
        mask = real[:, :, None, None].expand(-1, -1, self.tile, self.tile)
        noise = torch.randn(len(rows), max(counts), 3, self.tile, self.tile, generator=generator)
        return {"pixel_values": noise * mask[:, :, None], "pixel_attention_mask": mask.long()}


class SmolVLM(Idefics3):
    """Idefics 3 with video: each frame is an image of one tile behind a timestamp."""

    name = "smolvlm"
    end_ids = (c.END_OF_TURN,)
    config_class = SmolVLMConfig
    video_sizes = ((2, 1, 1), (3, 1, 1), (5, 1, 1))

    def video_ids(self, size: tuple[int, int, int]) -> list[int]:
        ids = [c.FIRST_TEXT, c.NEWLINE]
        for frame in range(size[0]):
            ids += [c.NEWLINE, c.FIRST_TEXT + 1 + frame, *self.image_ids((1, 1), 1)]
        return [*ids, c.NEWLINE]
