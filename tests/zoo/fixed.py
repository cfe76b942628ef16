"""Architectures of one fixed image size: V = the number of images times a constant.

An image size has no unit here: write (1, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Gemma3Config, LlavaConfig, PaliGemmaConfig, PreTrainedConfig

from . import common as c
from .common import Architecture, Row, Size


class Fixed(Architecture):
    image_sizes = ((1, 1),)
    image_size: int  # pixels
    visual: int  # visual tokens per image

    def image_ids(self, size: Size, count: int) -> list[int]:
        if size != (1, 1):
            raise ValueError(f"{self.name} has one image size: write (1, 1), got {size}")
        return [c.IMAGE] * self.visual

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        count = sum(len(row.images) for row in rows)
        return {"pixel_values": torch.randn(count, 3, self.image_size, self.image_size, generator=generator)}


class Llava(Fixed):
    """CLIP tower (its class token dropped), Llama decoder."""

    name = "llava"
    image_size, visual = 4 * c.PATCH, 16

    def config(self, layers: int) -> PreTrainedConfig:
        return LlavaConfig(
            text_config=c.text_config(layers, model_type="llama"),
            vision_config=c.tower_config("clip_vision_model", self.image_size, projection_dim=c.VISION_WIDTH),
            image_token_index=c.IMAGE,
            image_seq_length=self.visual,
        )


class LlavaSiglip(Fixed):
    """SigLIP tower (no class token), Qwen2 decoder, as in llava-interleave: biases in q, k and v."""

    name = "llava_siglip"
    image_size, visual = 5 * c.PATCH, 25

    def config(self, layers: int) -> PreTrainedConfig:
        return LlavaConfig(
            text_config=c.text_config(layers, model_type="qwen2"),
            vision_config=c.tower_config("siglip_vision_model", self.image_size, vision_use_head=False),
            image_token_index=c.IMAGE,
            image_seq_length=self.visual,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )


class Gemma3(Fixed):
    """Sliding-window layers between full ones (the first slides), q/k norms, visual tokens that attend both ways."""

    name = "gemma3"
    end_ids = (c.EOS, c.END_OF_TURN)
    image_size, visual = 8 * c.PATCH, 16

    def config(self, layers: int) -> PreTrainedConfig:
        return Gemma3Config(
            text_config=c.text_config(
                layers,
                head_dim=c.HEAD_DIM,
                query_pre_attn_scalar=c.HEAD_DIM,
                sliding_window=16,
                layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
            ),
            vision_config=c.tower_config("siglip_vision_model", self.image_size, vision_use_head=False),
            mm_tokens_per_image=self.visual,
            boi_token_index=c.VISION_START,
            eoi_token_index=c.VISION_END,
            image_token_index=c.IMAGE,
        )

    def image_ids(self, size: Size, count: int) -> list[int]:
        return [c.NEWLINE, c.VISION_START, *super().image_ids(size, count), c.VISION_END, c.NEWLINE]

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (input_ids == c.IMAGE).long()}


class PaliGemma(Fixed):
    """The whole prompt attends both ways; one KV head, as in Gemma 2B.

    Its prompts follow no chat template: a start id after the last image, a newline after the text, no end of turn, so a
    row's `tail` has no effect.
    """

    name = "paligemma"
    end_ids = (c.EOS,)
    image_size, visual = 4 * c.PATCH, 16

    def config(self, layers: int) -> PreTrainedConfig:
        return PaliGemmaConfig(
            text_config=c.text_config(
                layers, model_type="gemma", head_dim=c.HEAD_DIM, num_key_value_heads=1, eos_token_id=c.EOS
            ),
            vision_config=c.tower_config("siglip_vision_model", self.image_size, vision_use_head=False),
            image_token_index=c.IMAGE,
            vocab_size=c.VOCAB,
            projection_dim=c.WIDTH,
            hidden_size=c.WIDTH,
        )

    def row_ids(self, row: Row, generator: torch.Generator) -> list[int]:
        ids = c.text(row.before, generator)
        for i, size in enumerate(row.images):
            ids += c.text(row.between, generator) if i else []
            ids += self.image_ids(size, len(row.images))
        if row.video is not None:
            self.video_ids(row.video)
        return [*ids, c.START, *c.text(row.after, generator), c.NEWLINE]

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """0 for the prefix, which attends both ways, and 1 for a suffix to learn; prompts have no suffix."""
        return {"token_type_ids": torch.zeros_like(input_ids)}
