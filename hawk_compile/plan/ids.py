"""Ids that say where a question stands: those that steer the choice, as a model's configs name them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.settings.config import HawkConfig

VISION_END_NAMES = (
    "vision_end_token_id", "eoi_token_id", "eoi_token_index", "image_end_token_id", "video_end_token_id",
    "audio_end_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class SpecialIds:
    """Ids that steer the choice of the question; each may be empty."""

    vision_end: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    special: tuple[int, ...]


def special_ids(model: PreTrainedModel, config: HawkConfig) -> SpecialIds:
    """The ids of a model: as the settings give them, else as its configs name them."""
    return special_ids_of(model.config, model.generation_config, config)


def special_ids_of(model: PreTrainedConfig, generation: GenerationConfig, config: HawkConfig) -> SpecialIds:
    """The same, of a model's configs."""
    named = {name: number for name in dir(model) if name.endswith(("_token_id", "_token_index"))
             and isinstance(number := getattr(model, name, None), int)}
    vision_end = (config.vision_end_token_id,) if config.vision_end_token_id is not None else tuple(
        named[name] for name in VISION_END_NAMES if name in named)
    turn = config.end_of_turn_token_id if config.end_of_turn_token_id is not None else generation.eos_token_id
    end_of_turn = () if turn is None else (turn,) if isinstance(turn, int) else tuple(turn)
    others = [generation.bos_token_id, generation.pad_token_id, *named.values()]
    special = {number for number in others if isinstance(number, int)} | set(end_of_turn) | set(vision_end)
    return SpecialIds(vision_end, end_of_turn, tuple(sorted(special)))


def read_ids(ids: SpecialIds, chat: ChatFormat | None) -> list[int]:
    """Every id by which a question is found; of the others it only counts that they are text."""
    return [*dict.fromkeys([*ids.vision_end, *ids.end_of_turn, *ids.special, *(sorted(chat.ids) if chat else ())])]


def is_any(input_ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """Where any of the wanted ids stands."""
    there = torch.zeros_like(input_ids, dtype=torch.bool)
    for number in wanted:
        there = there | (input_ids == number)
    return there
