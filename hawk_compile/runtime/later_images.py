"""Images in a later turn of a model whose positions depend on images (mRoPE): where they stand behind the conversation.

Such models work out positions from the sizes of all images of a prompt; of a later turn only the new ones are given. So
the new tokens' positions are worked out as if they were a prompt of their own, and moved behind the conversation.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from hawk_compile.capture.encode import positions_of
from hawk_compile.capture.modalities import read_for_positions, tokens_of
from hawk_compile.compat.models import PREPARE_POSITIONS
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.conversation import conversation_of
from hawk_compile.runtime.originals import original
from hawk_compile.runtime.positions import deltas_kept

NEEDED = (
    "new images on a cache that already holds tokens need position_ids [3 or 4, B, S], or input_ids with all that the "
    "model works them out from (mm_token_type_ids, and the sizes of exactly these images), which this call does not "
    "give: give what the processor returns for these images"
)


def positions_behind(model: PreTrainedModel, cache: Cache, kwargs: dict[str, Any]) -> Tensor:
    """[axes, B, new]: the positions of new tokens among which images stand, behind a conversation.

    That a prompt is moved as a whole by what stands before it is tried for each: behind one token of text, every
    position must be larger by one.

    Args:
        kwargs: ids, mask and token types, each of the whole conversation [B, L] or of its new tokens.

    Raises:
        UnsupportedCallError: a call from which the model works out none, or a model that moves them otherwise.
    """
    ids, mask, past = kwargs.get("input_ids"), kwargs.get("attention_mask"), int(cache.get_seq_length())
    if ids is None:
        raise UnsupportedCallError(NEEDED)
    new = ids.shape[1] if mask is None else mask.shape[1] - past
    part = new_part(model, kwargs, new)
    before = past if mask is None else mask[:, :-new].sum(1)[:, None].to(ids.device)
    with deltas_kept(model):
        deltas = conversation_of(cache).rope_deltas
        if deltas is None:  # the cache was filled before the model was optimised
            deltas = getattr(model.base_model, "rope_deltas", None)
        alone, moved = (worked_out(model, arguments) for arguments in (part, behind_text(model, part)))
    if bool(((moved[..., 1:] != alone + 1) & (part["attention_mask"] != 0)).any()):
        raise UnsupportedCallError(
            f"new images on a cache that already holds tokens: {type(model).__name__} counts them, or their rows and "
            "columns, in a way that new tokens alone do not tell: give position_ids of the whole conversation, cut to "
            "the new tokens, or prefill the whole conversation at once"
        )
    return alone + before + (0 if deltas is None else deltas.to(ids.device))


def positions_of_later_turn(model: PreTrainedModel, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Positions of a whole conversation, of which those that a cache holds are not read again: [axes, B, L], with a row
    of text positions ahead where the model's generate has one."""
    ids = model_kwargs.get("input_ids")
    ids = inputs_tensor if ids is None or not ids.shape[1] else ids
    new = positions_behind(model, model_kwargs["past_key_values"], {**model_kwargs, "input_ids": ids})
    mask = model_kwargs["attention_mask"].long()
    text = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[None].to(new.device)
    whole = torch.cat([text[..., : -new.shape[-1]].expand(new.shape[0], -1, -1), new], -1)
    with deltas_kept(model):
        rows = original(model, PREPARE_POSITIONS)(ids[:, :1], {}).shape[0]
    return whole if rows == len(whole) else torch.cat([text, whole])


def new_part(model: PreTrainedModel, kwargs: dict[str, Any], new: int) -> dict[str, Any]:
    """The arguments by which positions are worked out, those of tokens [B, L] cut to the new ones."""
    rows, ids = tokens_of(kwargs).shape[0], kwargs["input_ids"][:, -new:]
    part = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "position_ids")}
    for name in read_for_positions(model):
        value = part.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == rows and value.shape[1] >= new:
            part[name] = value[:, -new:]
    if part.get("attention_mask") is None:
        part["attention_mask"] = torch.ones_like(ids)
    return {**part, "input_ids": ids}


def behind_text(model: PreTrainedModel, part: dict[str, Any]) -> dict[str, Any]:
    """The same behind one token of text in each row."""
    ids = part["input_ids"]
    firsts = {"input_ids": unnamed_id(model.config), "attention_mask": 1}
    longer = {
        name: torch.cat([value.new_full((value.shape[0], 1), firsts.get(name, 0)), value], 1)
        for name, value in part.items()
        if name in {*firsts, *read_for_positions(model)} and isinstance(value, Tensor) and value.shape == ids.shape
    }  # fmt: skip
    return {**part, **longer}


def unnamed_id(config: PretrainedConfig) -> int:
    """The smallest id that a configuration has no name for: text, and nothing that belongs to images."""
    named: set[Any] = set()
    for held in (config, config.get_text_config()):
        for name, value in vars(held).items():
            if "token" in name:
                named |= {*value} if isinstance(value, (list, tuple)) else {value}
    return next(number for number in range(len(named) + 1) if number not in named)


def worked_out(model: PreTrainedModel, part: dict[str, Any]) -> Tensor:
    """The positions that the model gives a prompt by itself.

    Raises:
        UnsupportedCallError: it gives none.
    """
    base: Any = model.base_model
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = None
    try:
        positions = positions_of(base, part)
    except (StopIteration, ValueError, IndexError, RuntimeError) as error:  # sizes run out, or are those of others
        raise UnsupportedCallError(NEEDED) from error
    if positions is None or positions.ndim != 3:
        raise UnsupportedCallError(NEEDED)
    return positions
