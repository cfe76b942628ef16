"""Tiny random-weight vision-language models, and prompts for them laid out as their processors would.

model = build("qwen2_5_vl")
model.generate(**inputs("qwen2_5_vl", model, rows=[Row(images=((4, 6),)), Row(images=((2, 3), (2, 2)))]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import audio, common, fixed, grids, latent, tiles
from .common import Architecture, Row, Size

__all__ = [
    "AUDIO_NAMES", "LATENT_NAMES", "NAMES", "VIDEO_NAMES", "Row", "build", "inputs", "sizes", "text_only",
    "visual_count", "visual_mask",
]  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        grids.Qwen2VL(),
        grids.Qwen25VL(),
        grids.Qwen3VL(),
        fixed.Llava(),
        fixed.LlavaSiglip(),
        tiles.LlavaNext(),
        tiles.LlavaOnevision(),
        tiles.InternVL(),
        tiles.SmolVLM(),
        tiles.Idefics3(),
        fixed.Gemma3(),
        fixed.PaliGemma(),
        grids.Mistral3(),
        grids.Glm4v(),
        latent.KimiK25(),
        audio.Qwen2Audio(),
        audio.Voxtral(),
        audio.Qwen25Omni(),
    )
}

AUDIO_NAMES: tuple[str, ...] = tuple(name for name, a in ARCHITECTURES.items() if a.audio_sizes)
LATENT_NAMES: tuple[str, ...] = ("kimi_k25",)
"""Of latent attention: its own tests, beside those of all others."""
NAMES: tuple[str, ...] = tuple(name for name in ARCHITECTURES if name not in (*AUDIO_NAMES, *LATENT_NAMES))
VIDEO_NAMES: tuple[str, ...] = tuple(name for name in NAMES if ARCHITECTURES[name].video_sizes)


def build(name: str, *, seed: int = 0, layers: int = 3) -> PreTrainedModel:
    """The model `name` with `layers` decoder layers, fp32, in eval mode; equal seeds give equal weights."""
    return common.build(_architecture(name), seed=seed, layers=layers)


def inputs(
    name: str, model: PreTrainedModel, *, rows: Sequence[Row], seed: int = 0, padding_side: str = "left"
) -> dict[str, Tensor]:
    """The keyword arguments that the processor of `name` would give for these rows, on the device of `model`.

    input_ids and attention_mask are [B, S]; shorter rows are padded on `padding_side`. Equal arguments give equal
    tensors.
    """
    batch = common.batch(_architecture(name), rows, seed=seed, padding_side=padding_side)
    return {key: value.to(model.device) for key, value in batch.items()}


def text_only(name: str, model: PreTrainedModel, *, tokens: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A single row of `tokens` text tokens, the start id and the end of the turn, without a picture."""
    return inputs(name, model, rows=[Row(before=0, after=tokens)], seed=seed)


def visual_mask(name: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Which positions are placeholders of an image, a video or an audio: bool [B, S]."""
    named = [getattr(model.config, f"{modality}_token_id", None) for modality in ("image", "video", "audio")]
    ids = [each for each in named if each is not None]
    return torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))


def visual_count(name: str, row: Row) -> int:
    """V of one row."""
    ids = _architecture(name).row_ids(row, torch.Generator())
    return sum(ids.count(each) for each in (common.IMAGE, common.VIDEO, common.AUDIO))


def sizes(name: str) -> list[Row]:
    """At least ten rows whose (V, S) differ: every image size, then several images, each with other text lengths."""
    single = _architecture(name).image_sizes
    pictures: list[tuple[Size, ...]] = [(size,) for size in single]
    pictures += [(single[i], single[(i + 1) % len(single)]) for i in range(min(3, len(single)))]
    pictures += [(single[0],) * 3]
    repeats = -(-12 // len(pictures))
    return [
        Row(images=images, before=1 + i % 3, between=i % 2, after=3 + 2 * i % 9 + 4 * repeat, tail=i % 3)
        for repeat in range(repeats)
        for i, images in enumerate(pictures)
    ]


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture is called {name!r}; there are {', '.join(NAMES)}")
    return ARCHITECTURES[name]
