"""Key-value caches after a pruned prefill: the length that was asked for beside the length that is held.

The *logical* length counts every token of the conversation, as `generate`, position ids and attention masks do; the
*physical* length counts the cache's slots. `Cache.get_seq_length` stays logical, so that a second turn slices its ids
rightly; `get_query_offset` and the layers are physical, so that masks fit the slots. The state lies on the cache: those
of two conversations never mix, and it follows beams, copies and crops.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer

from hawk_compile.errors import InputError, UnsupportedCallError


@dataclass(frozen=True)
class PrunedSlots:
    """Which logical positions the first slots of a cache hold; every later slot holds the next position, one to one.

    Attributes:
        positions: [B, P] int64, logical position of each of the first P slots.
        valid: [B, P] bool, False for slots that only fill a row up; None if all hold a token.
        logical: logical length at the time of pruning: slot P + i holds logical position `logical` + i.
        rope_deltas: [B, 1], what the model adds to a text position of this conversation, for models that keep it.
    """

    positions: Tensor
    valid: Tensor | None
    logical: int
    rope_deltas: Tensor | None = None

    @property
    def removed(self) -> int:
        """Logical length minus physical length."""
        return self.logical - self.positions.shape[1]

    def rows(self, index: Any) -> "PrunedSlots":
        """The state of other rows: `index` is applied to every tensor's first dimension."""
        valid = None if self.valid is None else index(self.valid)
        deltas = None if self.rope_deltas is None else index(self.rope_deltas)
        return replace(self, positions=index(self.positions), valid=valid, rope_deltas=deltas)


class PrunedCache(Cache):
    """Mixed into the class of a cache whose prompt was pruned. `hawk_slots` is its state."""

    hawk_slots: PrunedSlots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length."""
        return super().get_seq_length(layer_idx) + self.hawk_slots.removed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The physical length: where the next query stands among the slots."""
        return super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.hawk_slots = self.hawk_slots.rows(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.hawk_slots = self.hawk_slots.rows(lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.hawk_slots = self.hawk_slots.rows(lambda held: held[indices.to(held.device)])

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
        for layer in self.layers:
            if isinstance(layer, StaticLayer) and hasattr(layer, "hawk_asked_length"):
                layer.max_cache_len, layer.is_initialized = layer.hawk_asked_length, False
                del layer.hawk_asked_length
        del self.hawk_slots
        self.__class__ = type(self).__mro__[2]


@functools.cache
def pruned_class(plain: type[Cache]) -> type[PrunedCache]:
    return type(f"Pruned{plain.__name__}", (PrunedCache, plain), {"__doc__": PrunedCache.__doc__})


def mark_pruned(
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
    if isinstance(cache, PrunedCache):
        earlier = cache.hawk_slots
        held, first, before = earlier.positions, earlier.valid, earlier.logical
    else:
        held, first, before = keep.new_empty((rows, 0)), None, 0
    between = torch.arange(past - held.shape[1], device=device).expand(rows, -1) + before
    logical_past = before + between.shape[1]
    positions = torch.cat([held, between, keep + logical_past], dim=1)
    if first is not None or valid is not None:
        every = torch.ones_like(positions, dtype=torch.bool)
        parts = [every[:, : held.shape[1]] if first is None else first, every[:, : between.shape[1]],
                 every[:, : keep.shape[1]] if valid is None else valid]
        valid = torch.cat(parts, dim=1)
    if not isinstance(cache, PrunedCache):
        cache.__class__ = pruned_class(type(cache))  # type: ignore[arg-type]
    cache.hawk_slots = PrunedSlots(positions, valid, logical_past + length, rope_deltas)  # type: ignore[attr-defined]


def physical_length(cache: Cache | None) -> int:
    """How many slots of a cache are filled."""
    return 0 if cache is None else int(cache.get_query_offset())


def physical_mask(cache: PrunedCache, mask: Tensor | None, new_tokens: int) -> Tensor | None:
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


def of_slots(cache: PrunedCache, values: Tensor) -> Tensor:
    """Values of every position of the conversation [B, L], cut to the cache's slots and the new tokens [B, P + ...]."""
    slots = cache.hawk_slots
    return torch.cat([values.gather(1, slots.positions.to(values.device)), values[:, slots.logical :]], dim=1)
