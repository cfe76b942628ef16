"""A pruned conversation goes through pickle, torch.save and to other processes, and goes on there as here."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from transformers import DynamicCache, StaticCache

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime import tracked
from tests.marks import slow
from tests.runtime import pickled
from tests.runtime.models import fresh, generate, picture, plain, pruned
from tests.runtime.test_travelling import by_pickle, by_torch
from tests.runtime.test_turns import follow_up, turn

TEXT = torch.tensor([[60, 61, 62]])


@torch.no_grad()
def step(name: str, cache: Any) -> torch.Tensor:
    return pruned(name)(input_ids=TEXT, past_key_values=cache).logits


def kept_by_the_oldest_pickle(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache, protocol=0))


@pytest.mark.parametrize("through", [by_pickle, by_torch, copy.deepcopy, *slow(kept_by_the_oldest_pickle)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", *slow("gemma3", "qwen3_vl")])
def test_a_conversation_goes_on(name: str, through: Any) -> None:
    inputs = picture(name)
    out = turn(pruned(name), inputs, DynamicCache(config=plain(name).config.get_text_config()))
    cache = out.past_key_values
    twin = through(cache)
    again = through(twin)
    assert type(twin) is type(cache) and hawk_compile.report(twin).kept_tokens == hawk_compile.report(out).kept_tokens
    with pytest.raises(UnsupportedCallError, match="past_key_values holds a conversation of an optimised model"):
        plain(name)(input_ids=TEXT, past_key_values=twin)
    expected = step(name, cache)
    torch.testing.assert_close(step(name, twin), expected, rtol=0, atol=0)
    assert again.get_seq_length() == twin.get_seq_length() - 3  # the copies have nothing in common
    later = follow_up(inputs, out)
    later.pop("token_type_ids", None)
    assert turn(pruned(name), later, again).sequences.shape[1] == later["input_ids"].shape[1] + 6
    again.reset()
    assert type(again) is DynamicCache


def test_the_class_of_a_cache_is_made_where_it_is_loaded() -> None:
    """As in another process, where no cache has been tracked yet."""
    cache = turn(pruned("llava"), picture("llava"), DynamicCache()).past_key_values
    held = pickle.dumps(cache)
    for made in (tracked.sealed_class, tracked.tracked_class):
        made.cache_clear()
    twin = pickle.loads(held)
    assert type(twin) is not type(cache) and type(twin) is tracked.sealed_class(DynamicCache)
    torch.testing.assert_close(step("llava", twin), step("llava", cache), rtol=0, atol=0)
    assert type(copy.deepcopy(cache)) is tracked.sealed_class(DynamicCache)


def test_an_output_travels_with_its_report() -> None:
    with torch.no_grad():
        outputs = [pruned("llava")(**picture("llava")), generate(pruned("llava"), picture("llava"), 2)]
    for output in outputs:
        twin = by_pickle(output)
        assert type(twin) is type(output)
        assert hawk_compile.report(twin).keep_indices[0].equal(hawk_compile.report(output).keep_indices[0])


def test_a_new_cache_of_the_same_class_is_a_plain_one() -> None:
    """As code makes that copies what it is given; it knows nothing of the conversation."""
    name = "llava"
    cache = turn(pruned(name), picture(name), DynamicCache()).past_key_values
    assert type(type(cache)()) is DynamicCache and type(cache)().get_seq_length() == 0
    static = StaticCache(config=plain(name).config.get_text_config(), max_cache_len=80)
    turn(pruned(name), picture(name), static)
    new = type(static)(config=plain(name).config.get_text_config(), max_cache_len=9)
    assert type(new) is StaticCache and new.layers[0].max_cache_len == 9


@pytest.mark.slow
def test_another_process(tmp_path: Path) -> None:
    model, path = fresh("qwen2_5_vl"), tmp_path / "cache.pt"
    cache = turn(pruned("qwen2_5_vl"), picture("qwen2_5_vl"), DynamicCache()).past_key_values
    torch.save(cache, path)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context = torch.multiprocessing.start_processes(
        pickled.go_on, (model, str(path), TEXT, results), nprocs=1, join=False, start_method="spawn"
    )
    while not context.join():  # which raises what was raised there
        pass
    logits, kept = results.get()
    torch.testing.assert_close(torch.tensor(logits), step("qwen2_5_vl", cache)[0, -1])
    assert kept == hawk_compile.report(cache).kept_tokens
