"""Positions that depend on images (mRoPE): what a conversation adds to the positions of its later text.

Such models remember that offset of the last prompt they saw. Here each conversation's offset lies on its own cache.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hawk_compile.capture.modalities import positions_by_images
from hawk_compile.runtime.conversation import conversation_of, physical_length
from hawk_compile.runtime.tracked import TrackedCache

AXES = ("time", "height", "width")

LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""Of each model's body: guards its `rope_deltas`."""


def axes_of(model: PreTrainedModel) -> int:
    """How many positions a token has: of time, height and width, and of some models more."""
    rope: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return max(len(AXES), len(rope.get("mrope_section") or ()))  # a section may leave the last axes out


def next_positions(model: PreTrainedModel, cache: TrackedCache, mask: Tensor | None, new_tokens: int) -> Tensor:
    """[axes, B, new]: the positions of text tokens behind this conversation, with its own offset.

    The model would add the offset that it remembers, which may be another conversation's.
    """
    deltas = conversation_of(cache).rope_deltas
    assert deltas is not None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        text = (mask.long().cumsum(1) - 1)[:, -new_tokens:]
    else:
        text = torch.arange(new_tokens, device=deltas.device)[None] + cache.get_seq_length()
    return (text + deltas).expand(axes_of(model), -1, -1)


@contextmanager
def deltas_of(model: PreTrainedModel, cache: Any) -> Iterator[None]:
    """Let the model use this conversation's position offsets while it works out positions itself, and nobody else's.

    A cache that was filled before the model was optimised carries none: then the model's own are left as they are.
    One thread at a time: the model has one place for them.
    """
    base: Any = model.base_model
    with LOCKS.setdefault(base, threading.RLock()):
        if hasattr(base, "rope_deltas"):
            if isinstance(cache, TrackedCache):
                base.rope_deltas = conversation_of(cache).rope_deltas
            elif physical_length(cache) == 0:
                base.rope_deltas = None
        yield


@contextmanager
def deltas_kept(model: PreTrainedModel) -> Iterator[None]:
    """Leave the model with the offsets that it remembers, whatever runs inside; one thread at a time, as above."""
    base: Any = model.base_model
    with LOCKS.setdefault(base, threading.RLock()):
        remembered = getattr(base, "rope_deltas", None)
        try:
            yield
        finally:
            if hasattr(base, "rope_deltas"):
                base.rope_deltas = remembered


def deltas_after(
    model: PreTrainedModel, cache: Cache | None, positions: Tensor | None, mask: Tensor | None, rows: int, length: int
) -> Tensor | None:
    """What the model must add to a text position after this prompt, [B, 1]; None if it never adds anything.

    It is read off the prompt's own positions ([axes, B, S], or with a row of text positions ahead): the next token
    stands one behind the largest. What the model remembers may be of another conversation by now.
    """
    if not positions_by_images(model):
        return None
    if positions is None or positions.ndim != 3:
        return torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
    before = 0 if cache is None else int(cache.get_seq_length())
    real = before + length if mask is None else mask.sum(1)
    return (positions[-axes_of(model) :].amax((0, 2)) + 1 - real)[:, None].expand(rows, 1)
