"""Which text tokens vote on the visual ones (HAWK, arXiv 2604.07812; the reference implementation's rule).

The ids after the last image vote, up to (not including) the row's last end-of-turn id, so that the chat template's tail
has no voice. A prompt that ends with its image has no such text: then all text of the turn votes, special ids left out,
and if even that is empty, every text token does.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.settings.config import HawkConfig

VISION_END_NAMES = (
    "vision_end_token_id", "eoi_token_id", "eoi_token_index", "image_end_token_id", "audio_end_token_id",
)  # fmt: skip


class QuerySource(IntEnum):
    """Where a row's voting text came from."""

    AFTER_IMAGE = 0
    TURN = 1
    ANY_TEXT = 2


@dataclass(frozen=True)
class SpecialIds:
    """Ids that steer the choice of the voting text; each may be empty."""

    vision_end: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    special: tuple[int, ...]


def special_ids(model: PreTrainedModel, config: HawkConfig) -> SpecialIds:
    """The ids of a model: as the settings give them, else as its configs name them."""
    named = {name: found for name in dir(model.config) if name.endswith(("_token_id", "_token_index"))
             and isinstance(found := getattr(model.config, name, None), int)}
    vision_end = (config.vision_end_token_id,) if config.vision_end_token_id is not None else tuple(
        named[name] for name in VISION_END_NAMES if name in named)
    generation = model.generation_config
    turn = config.end_of_turn_token_id if config.end_of_turn_token_id is not None else generation.eos_token_id
    end_of_turn = () if turn is None else (turn,) if isinstance(turn, int) else tuple(turn)
    others = [generation.bos_token_id, generation.pad_token_id, *named.values()]
    special = {found for found in others if isinstance(found, int)} | set(end_of_turn) | set(vision_end)
    return SpecialIds(vision_end, end_of_turn, tuple(sorted(special)))


def voting_text(
    input_ids: Tensor, visual: Tensor, real: Tensor, ids: SpecialIds
) -> tuple[Tensor, Tensor]:
    """Which tokens vote, without reading anything back from the device.

    Args:
        input_ids: [B, S] int64; only the ids in `ids` matter.
        visual: [B, S] bool.
        real: [B, S] bool: what is not padding.

    Returns:
        votes [B, S] bool, and source [B] int64, a `QuerySource` per row.
    """
    text = real & ~visual
    position = torch.arange(visual.shape[1], device=visual.device)
    last_visual = last(visual, position)
    start = torch.maximum(last_visual, last(is_any(input_ids, ids.vision_end) & real, position))
    ends = is_any(input_ids, ids.end_of_turn) & real
    last_end = last(ends, position)
    stop = torch.where(last_end > start, last_end, visual.shape[1])
    turn_start = last(ends & (position < last_visual), position)
    plain = text & ~is_any(input_ids, ids.special)
    after = text & (position > start) & (position < stop)
    turn = plain & (position > turn_start) & (position < stop)
    has_after, has_turn = after.any(1, keepdim=True), turn.any(1, keepdim=True)
    # Logic, not torch.where: some runtimes that this is exported to choose between numbers only.
    votes = (after & has_after) | (~has_after & ((turn & has_turn) | (text & ~has_turn)))
    source = torch.where(has_after, QuerySource.AFTER_IMAGE,
                         torch.where(has_turn, QuerySource.TURN, QuerySource.ANY_TEXT)).squeeze(1)
    return votes, source


def counted(votes: Tensor, query: str) -> Tensor:
    """[B, S] bool: of the text that votes, what counts: for "last" its last token, else all of it."""
    if query != "last":
        return votes
    position = torch.arange(votes.shape[1], device=votes.device)
    return votes & (position == last(votes, position))


def is_any(input_ids: Tensor, wanted: tuple[int, ...]) -> Tensor:
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for each in wanted:
        found = found | (input_ids == each)
    return found


def last(mask: Tensor, position: Tensor) -> Tensor:
    """[B, 1]: the last position where the mask holds, or -1."""
    return torch.where(mask, position, -1).amax(1, keepdim=True)
