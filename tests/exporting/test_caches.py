"""What a cache holds goes out by name and comes in again."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from hawk_compile.exporting.caches import fill, held_by, is_held, length_dim, replace

ROWS, HEADS, PAST, WIDTH, KERNEL = 2, 3, 5, 4, 3


def empty() -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [
        LinearAttentionLayer(), DynamicLayer(), DynamicIndexedLayer(), LinearAttentionAndFullAttentionLayer(),
    ]  # fmt: skip
    return cache


def filled() -> DynamicCache:
    """As a model fills it."""
    cache = empty()
    for number in (1, 2, 3):
        cache.update(torch.randn(ROWS, HEADS, PAST, WIDTH), torch.randn(ROWS, HEADS, PAST, WIDTH), number)
    cache.layers[2].update_indexer(torch.randn(ROWS, PAST, WIDTH))
    for number in (0, 3):
        cache.layers[number].update_conv_state(torch.randn(ROWS, WIDTH, PAST), conv_kernel_size=KERNEL)
        cache.layers[number].update_recurrent_state(torch.randn(ROWS, HEADS, WIDTH, WIDTH))
    return cache


def test_a_cache_is_filled_by_what_another_holds() -> None:
    """And goes on as that one: the same step gives the same, and leaves what came in as it was."""
    whole, copy = filled(), empty()
    held = held_by(whole)
    assert sorted(held) == [
        "conv_state_0_0", "conv_state_3_0", "extra_key_2", "key_1", "key_2", "key_3", "recurrent_state_0_0",
        "recurrent_state_3_0", "value_1", "value_2", "value_3",
    ]  # fmt: skip
    assert all(map(is_held, held)) and not is_held("keep") and not is_held("logits")
    before = {name: tensor.clone() for name, tensor in held.items()}
    fill(copy, held)
    token, step = torch.randn(ROWS, HEADS, 1, WIDTH), torch.randn(ROWS, WIDTH, 1)
    for cache in (whole, copy):
        cache.update(token, token, 1)
        cache.layers[2].update_indexer(token[:, 0])
    assert torch.equal(*(cache.layers[0].update_conv_state(step) for cache in (copy, whole)))
    after = held_by(copy)
    assert after.keys() == held.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in held_by(whole).items())
    changed = [name for name, tensor in before.items() if not torch.equal(held[name], tensor)]
    assert changed == ["conv_state_0_0"]  # the first cache's own, which a step writes in place


@pytest.mark.parametrize(("name", "dim"), [("key_12", 2), ("value_0", 2), ("extra_key_3", 1), ("conv_state_3_1", None)])
def test_along_which_dimension_tokens_lie(name: str, dim: int | None) -> None:
    assert length_dim(name) == dim


def test_what_a_cache_holds_is_replaced() -> None:
    cache, other = filled(), held_by(filled())
    replace(cache, other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in held_by(cache).items())
