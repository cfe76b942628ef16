"""Tiny random-weight vision-language models, and prompts for them laid out as their processors would.

model = build("qwen2_5_vl")
model.generate(**inputs("qwen2_5_vl", model, rows=[Row(images=((4, 6),)), Row(images=((2, 3), (2, 2)))]))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import common, fixed, grids, tiles
from .common import Architecture, Row, Size

__all__ = ["NAMES", "VIDEO_NAMES", "Row", "build", "inputs", "sizes", "text_only", "visual_count", "visual_mask"]

_ARCHITECTURES: dict[str, Architecture] = {
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
    )
}

NAMES: tuple[str, ...] = tuple(_ARCHITECTURES)
VIDEO_NAMES: tuple[str, ...] = tuple(name for name, a in _ARCHITECTURES.items() if a.video_sizes)


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
    """Which positions are placeholders of an image or a video: bool [B, S]."""
    ids = [model.config.image_token_id, getattr(model.config, "video_token_id", model.config.image_token_id)]
    return torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))


def visual_count(name: str, row: Row) -> int:
    """V of one row."""
    ids = _architecture(name).row_ids(row, torch.Generator())
    return ids.count(common.IMAGE) + ids.count(common.VIDEO)


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
    if name not in _ARCHITECTURES:
        raise ValueError(f"no architecture is called {name!r}; there are {', '.join(NAMES)}")
    return _ARCHITECTURES[name]
