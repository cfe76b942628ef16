"""Architectures that hear: audio alone (Voxtral, Qwen2-Audio), and audio beside images and video (Qwen2.5-Omni).

The unit of an audio's length is the visual token: a row's `audio` of (8, 5) gives V = 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2_5OmniThinkerConfig, Qwen2AudioConfig, VoxtralConfig

from . import common as c
from .common import Architecture, Row
from .grids import MERGE, Patches, mrope

MELS = 8
AUDIO_WIDTH = 32
FRAMES = 4  # mel frames per visual token
CHUNK = 16  # visual tokens of the longest audio: what the towers' inputs are padded to


def audio_tower(**overrides: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": MELS,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": AUDIO_WIDTH,
        "max_source_positions": CHUNK * FRAMES // 2,
    } | overrides


class Audio(Architecture):
    """Audio placeholders between a start and an end id."""

    image_sizes = ()
    audio_sizes = ((5,), (8,), (3, 6), (16,), (7, 12), (11,), (4,), (9, 2))

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        """Mel frames [audios, MELS, T] and which of them are real [audios, T]."""
        lengths = torch.tensor([length for row in rows for length in row.audio])
        if not len(lengths):
            return {}
        features = torch.randn(len(lengths), MELS, CHUNK * FRAMES, generator=generator)
        frames = torch.arange(CHUNK * FRAMES).expand(len(lengths), -1)
        return {
            "input_features": features,
            "feature_attention_mask": (frames < FRAMES * lengths[:, None]).long(),
        }


class Qwen2Audio(Audio):
    name = "qwen2_audio"

    def config(self, layers: int) -> PreTrainedConfig:
        return Qwen2AudioConfig(
            text_config=c.text_config(layers, model_type="qwen2"),
            audio_config=audio_tower(model_type="qwen2_audio_encoder"),
            audio_token_index=c.AUDIO,
        )


class Voxtral(Audio):
    """Audio in chunks of one length, each of `CHUNK // 2` visual tokens."""

    name = "voxtral"
    audio_sizes = ((8,), (16,), (8, 8), (24,))

    def config(self, layers: int) -> PreTrainedConfig:
        width = {"hidden_size": AUDIO_WIDTH, "intermediate_size": FRAMES * AUDIO_WIDTH}
        names = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_mel_bins": MELS}
        return VoxtralConfig(
            text_config=c.text_config(layers, model_type="llama", head_dim=c.HEAD_DIM),
            audio_config={"model_type": "voxtral_encoder", "max_source_positions": 2 * CHUNK, **width, **names},
            audio_token_id=c.AUDIO,
        )

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        chunks = 2 * sum(length for row in rows for length in row.audio) // CHUNK
        return {"input_features": torch.randn(chunks, MELS, CHUNK * FRAMES, generator=generator)}


class Qwen25Omni(Audio, Patches):
    """The thinker, with mRoPE over images and audio, and Qwen2.5-VL's image inputs."""

    name = "qwen2_5_omni"
    end_ids = (c.END_OF_TURN, c.EOS)
    image_sizes = Patches.image_sizes

    def config(self, layers: int) -> PreTrainedConfig:
        vision = self.vision_config() | {
            "hidden_size": c.VISION_WIDTH,
            "intermediate_size": 48,
            "out_hidden_size": c.WIDTH,
            "window_size": 2 * MERGE * c.PATCH,
            "fullatt_block_indexes": [c.VISION_LAYERS - 1],
        }
        return Qwen2_5OmniThinkerConfig(
            text_config=c.text_config(layers, rope_parameters=mrope([2, 3, 3])),
            vision_config=vision,
            audio_config=audio_tower(output_dim=c.WIDTH, n_window=CHUNK),
            image_token_index=c.IMAGE,
            video_token_index=c.VIDEO,
            audio_token_index=c.AUDIO,
            audio_start_token_id=c.AUDIO_START,
            audio_end_token_id=c.AUDIO_END,
            vision_start_token_id=c.VISION_START,
            vision_end_token_id=c.VISION_END,
            user_token_id=c.TEMPLATE,
        )

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        return Patches.pixels(self, rows, generator) | super().pixels(rows, generator)

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {}
