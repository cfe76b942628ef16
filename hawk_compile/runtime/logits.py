"""`logits_to_keep` as positions: logits of a pruned prompt at the positions that its tokens had before pruning.

The graph gives the logits of every token that was kept, so that it is the one of all other calls, and those that were
asked for are picked from them: the whole vocabulary's logits of S' tokens are held for that long.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.plan.plan import Plan

NAME = "logits_to_keep"
SHOWN = 8
"""Positions that an error names, at most."""


def take_positions(kwargs: dict[str, Any], length: int) -> Tensor | None:
    """Take positions [n] int64 out of a call's arguments, on the host, each from 0 to S - 1; None where it asks for a
    number of last tokens, or nothing.

    Args:
        length: S.

    Raises:
        InputError: what does not say positions of the prompt.
    """
    asked = kwargs.get(NAME)
    if asked is None or isinstance(asked, int):
        return None
    if isinstance(asked, slice):
        places = torch.arange(length, device="cpu")[asked]
    elif isinstance(asked, (Tensor, list, tuple)):
        places = torch.as_tensor(asked).cpu()
    else:
        raise InputError(
            f"{NAME} must be a number of last tokens or positions [n], got {type(asked).__name__}: give an int, a "
            "slice, or a tensor or list of ints"
        )
    if places.dtype == torch.bool and tuple(places.shape) == (length,):
        places = places.nonzero()[:, 0]
    if places.ndim != 1 or places.is_floating_point() or places.dtype == torch.bool:
        raise InputError(
            f"{NAME} must be a number of last tokens, positions [n] or a mask [{length}], got {places.dtype} "
            f"{list(places.shape)}: give one list of positions for all rows"
        )
    places = places.to(torch.int64)
    if len(places) and not -length <= int(places.min()) <= int(places.max()) < length:
        raise InputError(
            f"{NAME} must hold positions of a prompt of {length} tokens, got {places.tolist()[:SHOWN]}: give ones from "
            f"{-length} to {length - 1}"
        )
    del kwargs[NAME]
    return places % length if length else places


def refuse_removed(places: Tensor, removable: Tensor, real: Tensor, plan: Plan) -> None:
    """Refuse positions of which a pruned prompt may have no logits, before anything is removed.

    Args:
        places: [n], on the host as the others.
        removable: [B, S] bool, the visual tokens that may be removed.
        real: [B, S] bool: what is not padding.

    Raises:
        UnsupportedCallError: visual tokens of a row that loses some, or padding.
    """
    shorter = plan.length < real.shape[1] or plan.least is not None
    for row, loses in enumerate(losing(plan)):
        for what, lost in (("visual tokens", removable[row] & loses), ("padding", ~real[row] & shorter)):
            if there := places[lost[places]].tolist():
                raise UnsupportedCallError(
                    f"{NAME} asks for the logits of {what} ({there[:SHOWN]} of row {row}), which a pruned prompt may "
                    "not hold: give positions of text, or call the model with ratio=0"
                )


def losing(plan: Plan) -> list[bool]:
    """Of each row, whether it may lose visual tokens."""
    fewest = plan.kept if plan.least is None else plan.least.tolist()
    return [low < count for low, count in zip(fewest, plan.visual, strict=True)]


def at_positions(result: ModelOutput, places: Tensor, keep: Tensor, valid: Tensor) -> ModelOutput:
    """An output with the logits [B, n, vocabulary] of these positions.

    Args:
        result: with logits [B, S', vocabulary].
        keep, valid: [B, S'].
    """
    places = places.to(keep.device)
    same = keep[:, None] == places[:, None]  # [B, n, S']
    slots = (same.to(torch.uint8) + (same & valid[:, None])).argmax(-1)  # what fills a row up has a place of its text
    logits = result["logits"]
    picked = logits.gather(1, slots.to(logits.device)[..., None].expand(-1, -1, logits.shape[-1]))
    return replace(result, logits=picked)  # type: ignore[type-var]
