"""Keys of pruned prompts, recognised where others have put them.

A cache that is made anew from the layers of another holds fewer tokens than the conversation has, and nothing on it
says so: positions and masks would be counted by its slots. So each pruned prefill leaves a copy of one key in each row:
that of the first token that stands in front of its own place, in the last layer. A cache that was not pruned cannot
hold it there, and one that is cut before it is whole.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.conversation import note, physical_length
from hawk_compile.runtime.tracked import TrackedCache

MOST = 1000
"""Prefills whose keys are remembered."""


@dataclass(frozen=True)
class MovedKeys:
    """What a pruned prefill of R rows leaves; nothing of it is looked at until a cache is asked about.

    Attributes:
        layer: where the keys are.
        slots: [R] int64.
        keys: [R, H, d], NaN in rows of which nothing was removed.
    """

    layer: int
    slots: Tensor
    keys: Tensor


def moved_keys(
    cache: Cache, config: PretrainedConfig, keep: Tensor, valid: Tensor | None, mask: Tensor | None, past: int
) -> MovedKeys | None:
    """
    Args:
        cache: what the graph has filled.
        config: of the text model.
        keep: [B, S'] int64, positions of the prompt that were kept.
        valid: [B, S'] bool, or None if every slot holds a token.
        mask: [B, S], nonzero for real tokens; None if all are.
        past: slots that were filled before the prompt.
    """
    layer = layer_to_ask(cache, config)
    if layer is None:
        return None
    keys: Tensor = cache.layers[layer].keys  # type: ignore[union-attr, assignment]
    place, slot = keep, torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    if mask is not None:
        place = ((mask != 0).cumsum(1) - 1).to(keep.device).gather(1, keep)
    if valid is not None:
        slot = valid.cumsum(1) - 1
    moved = place != slot if valid is None else (place != slot) & valid
    first = moved.int().argmax(1, keepdim=True)  # [B, 1]
    found = moved.gather(1, first).to(keys.device)
    slots = (first[:, 0] + past).to(keys.device)
    taken = keys.gather(2, slots[:, None, None, None].expand(-1, keys.shape[1], 1, keys.shape[3]))[:, :, 0]
    return MovedKeys(layer, slots, taken.masked_fill(~found[:, :, None], torch.nan))


def layer_to_ask(cache: Cache, config: PretrainedConfig) -> int | None:
    """The last layer that holds keys [B, H, S', d], of those that hold more than a window if there are any."""
    kinds = getattr(config, "layer_types", None) or ()
    fits = [number for number, layer in enumerate(cache.layers) if keys_in(layer) is not None]
    whole = [number for number in fits if number >= len(kinds) or "sliding" not in kinds[number]]
    return next(iter((whole or fits)[-1:]), None)


def keys_in(layer: Any) -> Tensor | None:
    keys = getattr(layer, "keys", None)
    return keys if isinstance(keys, Tensor) and keys.ndim == 4 and keys.is_floating_point() else None


def refuse_rebuilt(cache: Any, known: "deque[MovedKeys]") -> None:
    """Refuse a cache that does not know that its prompt was pruned. The device is waited for, once for each cache that
    no optimised model has filled.

    Raises:
        UnsupportedCallError: as said.
    """
    if not known or isinstance(cache, TrackedCache) or not isinstance(cache, Cache):
        return
    known_of = getattr(cache, "hawk_conversation", None)
    if (known_of is not None and known_of.slots is None) or not physical_length(cache):
        return
    if known_of is not None or holds(cache, tuple(known)):
        raise UnsupportedCallError(
            "past_key_values holds keys of a prompt that was pruned, in a cache that others have made of them, by "
            "which the conversation's tokens would be counted wrongly: hand on the cache itself that the call returned "
            "(past_key_values of its output), or copy.deepcopy or a pickle of it, and change its rows by its own "
            "methods"
        )
    note(cache)  # which need not be asked again


def holds(cache: Cache, known: Iterable[MovedKeys]) -> bool:
    """Whether a cache holds, in any row, a key where a pruned prompt has it."""
    by_layer: dict[tuple[int, int, int], list[MovedKeys]] = {}
    for each in known:
        by_layer.setdefault((each.layer, *each.keys.shape[1:]), []).append(each)  # type: ignore[arg-type]
    for (number, heads, size), several in by_layer.items():
        keys = keys_in(cache.layers[number]) if number < len(cache.layers) else None
        if keys is None or (keys.shape[1], keys.shape[3]) != (heads, size):
            continue
        slots = torch.cat([each.slots.to(keys.device) for each in several])  # [N]
        wanted = torch.cat([each.keys.to(keys) for each in several])  # [N, H, d]
        there = keys.index_select(2, slots.clamp(max=keys.shape[2] - 1))  # [B, H, N, d]
        same = (there == wanted.transpose(0, 1)).all(-1).all(1) & (slots < keys.shape[2])
        if bool(same.any()):
            return True
    return False
