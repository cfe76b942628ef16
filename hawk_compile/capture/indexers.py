"""Indexers that no graph can take as they are: one operator in the graph instead.

A sparse attention's indexer says which keys each query may see. Some look for them in a loop over rows and queries,
whose length and numbers are data. Others count blocks of keys, by branches on how many keys there are, which behind the
cut are fewer; and they take the position of a query for its slot, its place among the keys that are held. As an
operator an indexer is opaque: what it runs is the model's own forward, at the sizes that there are, with slots for
positions. Only the keys that it remembers pass by the operator, since a cache is written by the graph itself.

Outside of captures, what stands in for an indexer's forward makes a difference to calls whose cache counts otherwise
than its slots.
"""

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.capture.shells import Forward, ForwardsStoodFor, description, name_of_shell, weights_of
from hawk_compile.compat.models import EXTRA_KEYS

BY_DATA = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
BY_SLOTS = ("hidden_states", "position_embeddings", "past_key_values", "position_ids")
"""How transformers calls such indexers: tokens [B, S, D], two rotary tables [B, S or P + S, d], the mask
[B, 1, S, P + S] or the positions [B, S], and the cache."""

NUMBER = ("layer_idx",)
"""Says which layer of the cache an indexer remembers its keys in, which is done outside of the operator."""


class Remembered:
    """Stands for the cache inside of the operator: what the indexer adds is kept apart, what it reads is as in one."""

    def __init__(self, past: Tensor | None):
        self.past = past
        self.added: Tensor | None = None

    @property
    def layers(self) -> "Remembered":
        return self

    def __getitem__(self, layer_idx: int) -> "Remembered":
        return self

    def update_indexer(self, keys: Tensor, layer_idx: int = 0) -> Tensor:
        self.added = keys
        return keys if self.past is None else torch.cat([self.past, keys], dim=-2)

    update_index = update_indexer


@torch.library.custom_op("hawk::choose_keys", mutates_args=())
def choose_keys(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None, past: Tensor | None,
    weights: list[Tensor], indexer: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which keys each query may see, and what the indexer remembers of the new tokens, [B, ..., S, d].

    The keys are a mask [B, ., S, P + S] of bools; or numbers [B, ., S, P + S] of keys or of blocks of them, of which
    the last stands in all places that are left: a set is the same with a number in it twice.

    Args:
        past: [B, ..., P, d] that it remembers; None if nothing.
        weights: of the indexer, in the order of their names.
        indexer: the name of its shell.
    """
    remembered = Remembered(past)
    chosen = run(indexer, weights, hidden_states, (cos, sin), attention_mask, remembered)
    assert remembered.added is not None
    missing = slots_before(past) + hidden_states.shape[1] - chosen.shape[-1]
    if missing:
        chosen = torch.cat([chosen, chosen[..., -1:].expand(*chosen.shape[:-1], missing)], -1)
    return chosen.contiguous(), remembered.added.clone(memory_format=torch.contiguous_format)


@choose_keys.register_fake
def _(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None, past: Tensor | None,
    weights: list[Tensor], indexer: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, length = hidden_states.shape[:2]
    one = [each.new_empty((1, 1, each.shape[2])) for each in (hidden_states, cos, sin)]
    slots = slots_before(past) + length
    if attention_mask is not None:
        chosen = attention_mask.new_empty((rows, 1, length, slots), dtype=torch.bool)
        remembered: Remembered = AsksOnly(None)
        with contextlib.suppress(KeysSeen):
            run(indexer, weights, one[0], (one[1], one[2]), attention_mask.new_empty((1, 1, 1, 1)), remembered)
    else:
        remembered = Remembered(None)
        small = run(indexer, weights, one[0], (one[1], one[2]), None, remembered)
        chosen = small.new_empty((rows, small.shape[1], length, slots))
    keys = remembered.added
    assert keys is not None
    return chosen, keys.new_empty((rows, *keys.shape[1:-2], length, keys.shape[-1]))


class KeysSeen(Exception):
    """Ends an indexer that is only asked what it remembers: what follows needs data."""


class AsksOnly(Remembered):
    """A cache for an indexer of one token, which is asked for no more than the shape of its keys."""

    def update_indexer(self, keys: Tensor, layer_idx: int = 0) -> Tensor:
        self.added = keys
        raise KeysSeen


def slots_before(past: Tensor | None) -> int:
    return 0 if past is None else past.shape[-2]


def run(
    indexer: str, weights: list[Tensor], hidden_states: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None,
    remembered: Remembered,
) -> Tensor:  # fmt: skip
    """The own forward of an indexer that has these weights."""
    given: dict[str, Any] = {"position_embeddings": tables, "past_key_values": remembered}
    if mask is not None:
        given["attention_mask"] = mask
    else:
        given["position_ids"] = slots_of(hidden_states, remembered.past)
    return indexers_stood_for.run(indexer, weights, hidden_states, **given)  # type: ignore[no-any-return]


def slots_of(hidden_states: Tensor, past: Tensor | None) -> Tensor:
    """[B, S]: the places of new tokens among the keys."""
    rows, length = hidden_states.shape[:2]
    before = slots_before(past)
    return torch.arange(before, before + length, device=hidden_states.device).expand(rows, -1)


def stand_in(original: Forward) -> Forward:
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given["past_key_values"]
        captured = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
        if not captured or not (shell := name_of_shell(self, NUMBER)):
            if "position_ids" in given and cache is not None and counts_otherwise(cache, self.layer_idx):
                given["position_ids"] = slots_of(given["hidden_states"], remembered_in(cache, self.layer_idx))
            return original(self, **given)  # type: ignore[no-any-return]
        past = None if cache is None else remembered_in(cache, self.layer_idx)
        chosen, added = torch.ops.hawk.choose_keys(
            given["hidden_states"], *given["position_embeddings"], given.get("attention_mask"), past,
            weights_of(self), shell,
        )  # fmt: skip
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            for name, method in EXTRA_KEYS.items():
                if hasattr(layer, name):
                    getattr(layer, method)(added)
        return chosen

    return forward


def counts_otherwise(cache: Any, layer_idx: int) -> bool:
    """Whether a cache holds fewer slots than its conversation has tokens."""
    return bool(cache.get_seq_length(layer_idx) != cache.get_query_offset(layer_idx))


def remembered_in(cache: Any, layer_idx: int) -> Tensor | None:
    """The keys of an indexer in a layer of a cache."""
    for name in EXTRA_KEYS:
        if hasattr(cache.layers[layer_idx], name):
            return getattr(cache.layers[layer_idx], name)  # type: ignore[no-any-return]
    return None


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is such an indexer, and nothing but what is known of it tells two of them apart."""
    kind: Any = type(module)
    return chooses_keys(kind) and description(module, NUMBER) is not None


def counts_slots(module: nn.Module) -> bool:
    """Whether a module is an indexer that takes positions for slots."""
    kind: Any = type(module)
    return chooses_keys(kind) and "position_ids" in inspect.signature(kind.forward).parameters


@functools.cache
def chooses_keys(kind: Any) -> bool:
    forward = inspect.unwrap(kind.forward)
    names = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
    taken = tuple(inspect.signature(forward).parameters)[1:]
    return bool(names & {*EXTRA_KEYS.values()}) and (taken == BY_SLOTS or (taken == BY_DATA and "nonzero" in names))


indexers_stood_for = ForwardsStoodFor(is_opaque, stand_in)
