"""What a conversation leaves on its key-value cache: the length that was asked for beside the length that is held.

The *logical* length counts every token of the conversation, as `generate`, position ids and attention masks do; the
*physical* length counts the cache's slots. `Cache.get_seq_length` stays logical, so that a second turn slices its ids
rightly; `get_query_offset` and the layers are physical, so that masks fit the slots. The state lies on the cache, never
on the model: that of two conversations does not mix, and it follows beams, copies and crops.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hawk_compile.runtime.records import PrefillRecord


@dataclass(frozen=True)
class Slots:
    """Which logical positions the first slots of a cache hold; every later slot holds the next position, one to one.

    Attributes:
        positions: [B, P] int64, logical position of each of the first P slots.
        valid: [B, P] bool, False for slots that only fill a row up; None if all hold a token.
        logical: logical length at the time of pruning: slot P + i holds logical position `logical` + i.
    """

    positions: Tensor
    valid: Tensor | None
    logical: int

    @property
    def removed(self) -> int:
        """Logical length minus physical length."""
        return self.logical - self.positions.shape[1]

    def without_last(self, count: int) -> "Slots | None":
        """The first slots, without the last `count` of them; None where these are not the last tokens, one for one.

        What is cut off is looked at, for which the device is waited for.
        """
        left = self.positions.shape[1] - count
        if left < 0:
            return None
        last = torch.arange(self.logical - count, self.logical, device=self.positions.device)
        # Padding that ends a prompt has slots as tokens have; what fills a row up repeats another slot's position.
        same = (self.positions[:, left:] == last).all() & (self.positions[:, :left] < self.logical - count).all()
        if not same:
            return None
        valid = None if self.valid is None else self.valid[:, :left]
        return Slots(self.positions[:, :left], valid, self.logical - count)


@dataclass(frozen=True)
class Conversation:
    """All that is known of the conversation whose keys and values a cache holds.

    Attributes:
        slots: what the cache's slots hold; None where each holds its own position.
        rope_deltas: [B, 1], what the model adds to a text position of this conversation; None where it adds nothing.
        record: what the last prefill did.
        plain: the class of the cache before it was tracked, which it has again when it is empty; None: it is not.
        asked_length: of a cache of fixed size that generate made for one call and that holds nothing yet: the length
            without pruning.
        layer_lengths: of a cache that was allocated for a pruned prompt: the length of each layer for one of any kind.
        spoiled: whether a call has failed when it had filled a part of the cache.
    """

    slots: Slots | None = None
    rope_deltas: Tensor | None = None
    record: PrefillRecord | None = None
    plain: type[Cache] | None = None
    asked_length: int | None = None
    layer_lengths: tuple[int | None, ...] = ()
    spoiled: bool = False

    @property
    def counts_otherwise(self) -> bool:
        """Whether a model that knows nothing of this may count the conversation's tokens in another way.

        The offset that such a model would add, even to a conversation of text, is that of the last prompt it saw.
        """
        slots = self.slots
        return slots is not None and bool(slots.removed or slots.valid is not None or self.rope_deltas is not None)

    def rows(self, index: Any) -> "Conversation":
        """The state of other rows: `index` is applied to every tensor's first dimension."""
        slots, deltas = self.slots, self.rope_deltas
        if slots is not None:
            valid = None if slots.valid is None else index(slots.valid)
            slots = replace(slots, positions=index(slots.positions), valid=valid)
        return replace(self, slots=slots, rope_deltas=None if deltas is None else index(deltas))


def conversation_of(cache: Any) -> Conversation:
    """What is known of the conversation on a cache: nothing, if no optimised model has filled it."""
    return getattr(cache, "hawk_conversation", None) or Conversation()


def note(cache: Cache, **changes: Any) -> None:
    """Change what is known of the conversation on a cache; its fields by name."""
    cache.hawk_conversation = replace(conversation_of(cache), **changes)  # type: ignore[attr-defined]


def physical_length(cache: Cache | None) -> int:
    """How many slots of a cache are filled."""
    return 0 if cache is None else int(cache.get_query_offset())
