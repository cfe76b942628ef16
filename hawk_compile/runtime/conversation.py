"""What a conversation leaves on its key-value cache: the length that was asked for beside the length that is held.

The *logical* length counts every token of the conversation, as `generate`, position ids and attention masks do; the
*physical* length counts the cache's slots. `Cache.get_seq_length` stays logical, so that a second turn slices its ids
rightly; `get_query_offset` and the layers are physical, so that masks fit the slots. The state lies on the cache, never
on the model: that of two conversations does not mix, and it follows beams, copies and crops.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from hawk_compile.errors import InputError, UnsupportedCallError
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
    """

    slots: Slots | None = None
    rope_deltas: Tensor | None = None
    record: PrefillRecord | None = None
    plain: type[Cache] | None = None
    asked_length: int | None = None
    layer_lengths: tuple[int | None, ...] = ()

    def rows(self, index: Any) -> "Conversation":
        """The state of other rows: `index` is applied to every tensor's first dimension."""
        slots, deltas = self.slots, self.rope_deltas
        if slots is not None:
            valid = None if slots.valid is None else index(slots.valid)
            slots = replace(slots, positions=index(slots.positions), valid=valid)
        return replace(self, slots=slots, rope_deltas=None if deltas is None else index(deltas))


class TrackedCache(Cache):
    """Mixed into the class of a cache whose conversation counts otherwise than its slots."""

    hawk_conversation: Conversation

    @property
    def hawk_slots(self) -> Slots:
        slots = self.hawk_conversation.slots
        assert slots is not None
        return slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length."""
        return super().get_seq_length(layer_idx) + self.hawk_slots.removed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The physical length: where the next query stands among the slots."""
        return super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.take_rows(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.take_rows(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.take_rows(lambda held: held[indices.to(held.device)])

    def take_rows(self, index: Any) -> None:
        self.hawk_conversation = self.hawk_conversation.rows(index)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Raises:
            UnsupportedCallError: the crop would reach into the pruned prompt, of which only some tokens are left.
        """
        left = int(self.get_query_offset()) - abs(tokens_to_remove)
        held = self.hawk_slots.positions.shape[1]
        if tokens_to_remove and left < held:
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) would leave {left} slots of a pruned prompt that holds {held}; crop only "
                "what came after the prompt, or prefill again"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Empty the cache. Layers that were allocated for a pruned prompt are allocated anew, for one of any kind."""
        super().reset()
        conversation = self.hawk_conversation
        for layer, length in zip(self.layers, conversation.layer_lengths, strict=False):
            if isinstance(layer, StaticLayer) and length is not None:
                layer.max_cache_len, layer.is_initialized = length, False
        del self.hawk_conversation
        assert conversation.plain is not None
        self.__class__ = conversation.plain  # type: ignore[assignment]


@functools.cache
def tracked_class(plain: type[Cache]) -> type[TrackedCache]:
    return type(f"Tracked{plain.__name__}", (TrackedCache, plain), {"__doc__": TrackedCache.__doc__})


def conversation_of(cache: Any) -> Conversation:
    """What is known of the conversation on a cache: nothing, if no optimised model has filled it."""
    return getattr(cache, "hawk_conversation", None) or Conversation()


def note(cache: Cache, **changes: Any) -> None:
    """Change what is known of the conversation on a cache; its fields by name."""
    cache.hawk_conversation = replace(conversation_of(cache), **changes)  # type: ignore[attr-defined]


def track(
    cache: Cache, keep: Tensor, valid: Tensor | None, past: int, length: int, rope_deltas: Tensor | None
) -> None:
    """Make a cache that has just taken a pruned prompt count logically from now on.

    Its class becomes a subclass of what it was.

    Args:
        keep: [B, S'] int64, the positions of the prompt that were kept, within the prompt.
        valid: [B, S'] bool, or None if every slot holds a token.
        past: physical length before the prompt.
        length: S, the prompt's full length.
        rope_deltas: [B, 1] or None.
    """
    rows, device = keep.shape[0], keep.device
    earlier = conversation_of(cache).slots or Slots(keep.new_empty((rows, 0)), None, 0)
    held = earlier.positions
    between = torch.arange(past - held.shape[1], device=device).expand(rows, -1) + earlier.logical
    logical_past = earlier.logical + between.shape[1]
    positions = torch.cat([held, between, keep + logical_past], dim=1)
    if earlier.valid is not None or valid is not None:
        every = torch.ones_like(positions, dtype=torch.bool)
        parts = [every[:, : held.shape[1]] if earlier.valid is None else earlier.valid, every[:, : between.shape[1]],
                 every[:, : keep.shape[1]] if valid is None else valid]
        valid = torch.cat(parts, dim=1)
    if not isinstance(cache, TrackedCache):
        note(cache, plain=type(cache))
        cache.__class__ = tracked_class(type(cache))  # type: ignore[arg-type]
    note(cache, slots=Slots(positions, valid, logical_past + length), rope_deltas=rope_deltas)


def physical_length(cache: Cache | None) -> int:
    """How many slots of a cache are filled."""
    return 0 if cache is None else int(cache.get_query_offset())


def physical_mask(cache: TrackedCache, mask: Tensor | None, new_tokens: int) -> Tensor | None:
    """The mask over slots and new tokens [B, P + ...] for a logical one [B, L], or None where nothing is masked.

    Raises:
        InputError: the mask covers fewer positions than the conversation has.
    """
    slots = cache.hawk_slots
    if mask is None:
        if slots.valid is None:
            return None
        tail = physical_length(cache) - slots.valid.shape[1] + new_tokens
        return torch.cat([slots.valid, slots.valid.new_ones((slots.valid.shape[0], tail))], dim=1).long()
    expected = int(cache.get_seq_length()) + new_tokens
    if mask.shape[1] != expected:
        raise InputError(
            f"attention_mask must cover the whole conversation, {expected} positions (cached ones included), got shape "
            f"{tuple(mask.shape)}"
        )
    physical = of_slots(cache, mask)
    if slots.valid is not None:
        physical[:, : slots.valid.shape[1]] *= slots.valid.to(physical.device, physical.dtype)
    return physical


def of_slots(cache: TrackedCache, values: Tensor) -> Tensor:
    """Values of every position of the conversation [B, L], cut to the cache's slots and the new tokens [B, P + ...]."""
    slots = cache.hawk_slots
    return torch.cat([values.gather(1, slots.positions.to(values.device)), values[:, slots.logical :]], dim=1)
