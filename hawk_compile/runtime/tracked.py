"""The caches that count a conversation's tokens as it has them, and that only an optimised model may read and fill."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime.conversation import Conversation, Slots, conversation_of, note, physical_length

USED_BY_MODELS = ("get_mask_sizes", "update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods of a cache that a forward calls, and nobody who only looks at it, moves its rows or crops it."""


class TrackedCache(Cache):
    """Mixed into the class of a cache whose conversation counts otherwise than its slots."""

    hawk_conversation: Conversation
    hawk_sealed = False
    """Whether it is of a `sealed_class`."""

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
        """Remove the last tokens: what came behind a pruned prompt, and the text that ends it.

        Raises:
            UnsupportedCallError: the crop would reach what was pruned, of which only some tokens are left, or a prompt
                that is held in states.
            InputError: a number above 0, which old releases took for the length that is left.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}: give "
                f"{-tokens_to_remove} to remove as many"
            )
        left = int(self.get_query_offset()) - abs(tokens_to_remove)
        held = self.hawk_slots.positions.shape[1]
        if not tokens_to_remove or left >= held:
            return super().crop(tokens_to_remove)
        states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        slots = None if states else self.hawk_slots.without_last(held - left)
        if slots is None:
            raise UnsupportedCallError(
                f"crop({tokens_to_remove}) would leave {left} slots of a pruned prompt that holds {held}, and reach "
                "what was pruned, or a state; crop only what came after the prompt, or the text that ends it, or "
                "prefill again"
            )
        super().crop(tokens_to_remove)
        note(self, slots=slots)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How copy, pickle and torch.save take it apart: as the cache that it was, which is tracked again behind them,
        since its class is made while the program runs and has no name to be found by."""
        taken: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = taken
        own = type(self)
        plain = self.hawk_conversation.plain
        by = sealed_class if own.hawk_sealed else tracked_class
        return put_together, (by, make, tuple(plain if each is own else each for each in arguments)), *state

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
    def new(cls: Any, *args: Any, **kwargs: Any) -> Cache:
        return plain(*args, **kwargs)  # of which nothing is known, as `type(cache)()` asks for

    methods = {"__doc__": TrackedCache.__doc__, "__new__": new}
    return type(f"Tracked{plain.__name__}", (TrackedCache, plain), methods)


def put_together(
    by: Callable[[type[Cache]], type[TrackedCache]], make: Callable[..., Cache], arguments: tuple[Any, ...]
) -> Cache:
    """A tracked cache without attributes, which copy or pickle gives it."""
    cache = make(*arguments)
    cache.__class__ = by(type(cache))
    return cache


@functools.cache
def sealed_class(plain: type[Cache]) -> type[TrackedCache]:
    """What a tracked cache is of while no optimised model's forward runs on it."""
    tracked = tracked_class(plain)  # type: ignore[arg-type]
    methods = {name: refusing(getattr(tracked, name)) for name in USED_BY_MODELS if hasattr(tracked, name)}
    attributes = {"__doc__": TrackedCache.__doc__, "hawk_sealed": True, **methods}
    return type(f"Sealed{plain.__name__}", (tracked,), attributes)


def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a cache that refuses the forward of a model that would count the conversation's tokens wrongly.

    Raises:
        UnsupportedCallError: always, unless every token is there and stands where such a model takes it to be.
    """

    @functools.wraps(method)
    def checked(self: TrackedCache, *args: Any, **kwargs: Any) -> Any:
        if self.hawk_conversation.counts_otherwise:
            raise UnsupportedCallError(
                f"past_key_values holds a conversation of an optimised model: {physical_length(self)} of its "
                f"{int(self.get_seq_length())} tokens, at positions that a model that is not optimised, or a part of a "
                "model called by itself, would count wrongly. Go on with it by the whole model, in the "
                "hawk_compile.pruned block or after hawk_compile.optimize, or start the conversation anew on an empty "
                "cache"
            )
        return method(self, *args, **kwargs)

    return checked


@contextlib.contextmanager
def opened(cache: Any) -> Iterator[None]:
    """Let a forward read and fill a cache inside, whose mask and positions are made for the cache's slots.

    The cache is of another class meanwhile, so that what is compiled holds no check.
    """
    before = type(cache)
    plain = conversation_of(cache).plain
    layers = len(getattr(cache, "layers", ()))
    try:
        if plain is not None:
            cache.__class__ = tracked_class(plain)  # type: ignore[arg-type]
        yield
    except BaseException:
        if getattr(cache, "layers", None) and filled_in_part(cache, layers):
            note(cache, spoiled=True)
        raise
    finally:
        if plain is not None and isinstance(cache, TrackedCache):  # it has not been emptied
            cache.__class__ = before


def filled_in_part(cache: Cache, layers: int) -> bool:
    """Whether a call that failed may have left a cache of which layers hold other tokens than others do.

    Args:
        layers: how many there were before. A cache without a config makes them as they are filled.
    """
    held = {int(layer.get_seq_length()) for layer in cache.layers if isinstance(layer, CacheLayerMixin)}
    keeps_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
    return len(held) > 1 or len(cache.layers) != layers or keeps_states


@contextlib.contextmanager
def spoiled_by_failure(cache: Cache | None) -> Iterator[None]:
    """Where a prompt is handed on to a cache, all of it or nothing is left there that can be gone on with."""
    before = physical_length(cache)
    try:
        yield
    except BaseException:
        if cache is not None and physical_length(cache) != before:
            note(cache, spoiled=True)
        raise


def refuse_spoiled(cache: Any) -> None:
    """
    Raises:
        UnsupportedCallError: a cache that a failed call has filled in part, so that its layers hold different tokens.
    """
    known = getattr(cache, "hawk_conversation", None)
    if known is None or not known.spoiled:
        return
    if physical_length(cache):
        raise UnsupportedCallError(
            "past_key_values was left filled in part by a call that failed, so that some layers hold tokens that "
            "others do not: start the conversation anew on an empty cache"
        )
    note(cache, spoiled=False)


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
        cache.__class__ = sealed_class(type(cache))  # type: ignore[arg-type]
    note(cache, slots=Slots(positions, valid, logical_past + length), rope_deltas=rope_deltas)


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
            f"{tuple(mask.shape)}: give one that is as long"
        )
    physical = of_slots(cache, mask)
    if slots.valid is not None:
        physical[:, : slots.valid.shape[1]] *= slots.valid.to(physical.device, physical.dtype)
    return physical


def of_slots(cache: TrackedCache, values: Tensor) -> Tensor:
    """Values of every position of the conversation [B, L], cut to the cache's slots and the new tokens [B, P + ...]."""
    slots = cache.hawk_slots
    return torch.cat([values.gather(1, slots.positions.to(values.device)), values[:, slots.logical :]], dim=1)
