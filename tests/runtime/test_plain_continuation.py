"""A pruned conversation's cache in a model that does not prune: refused by name, whatever its kind; looking is free."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.versions import installed, release
from tests import zoo
from tests.runtime.models import LAYERS, ROUNDING, fresh, picture, plain, pruned
from tests.runtime.test_caches import FIRST_FP8
from tests.runtime.test_turns import follow_up, turn

REFUSED = (
    r"past_key_values holds a conversation of an optimised model: \d+ of its \d+ tokens.* in the hawk_compile.pruned "
    "block or after hawk_compile.optimize, or start the conversation anew on an empty cache"
)


def cache_of(name: str, kind: str) -> Cache:
    config = plain(name).config.get_text_config()
    if kind == "static":
        return StaticCache(config=config, max_cache_len=128)
    return DynamicCache(config=config) if kind == "dynamic" else QuantizedCache(backend="fp8", config=config)


def parts(cache: Any) -> list[Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def refuse(call: Callable[..., Any], cache: Cache, **arguments: Any) -> None:
    """The call is refused, and the cache holds what it held."""
    before, length = parts(cache), int(cache.get_seq_length())
    with pytest.raises(UnsupportedCallError, match=REFUSED), torch.no_grad():
        call(past_key_values=cache, **arguments)
    assert int(cache.get_seq_length()) == length
    assert all(now.equal(then) for now, then in zip(parts(cache), before, strict=True))


def token(cache: Cache) -> dict[str, Tensor]:
    """A step with a mask over the whole conversation and no positions."""
    length = int(cache.get_seq_length())
    return {"input_ids": torch.tensor([[70]]), "attention_mask": torch.ones(1, length + 1, dtype=torch.long)}


fp8 = pytest.mark.skipif(
    release(installed("transformers")) < release(FIRST_FP8), reason="a quantised cache without the backend fp8"
)


@pytest.mark.parametrize(("name", "kind"), [
    ("qwen2_5_vl", "dynamic"), ("llava", "dynamic"), ("llava", "static"), pytest.param("llava", "fp8", marks=fp8),
    ("gemma3", "dynamic"), ("gemma3", "static"),
])  # fmt: skip
def test_every_kind_of_cache(name: str, kind: str) -> None:
    """By forward and by generate, with a mask and without; its own model goes on as if nobody had asked."""
    first, cache = picture(name), cache_of(name, kind)
    second = follow_up(first, turn(pruned(name), first, cache))
    for other in (cache, copy.copy(cache), twin := copy.deepcopy(cache)):
        refuse(plain(name), other, **token(cache))
    refuse(plain(name), cache, input_ids=torch.tensor([[70]]))
    refuse(plain(name).generate, cache, **second, max_new_tokens=2)
    asked, unasked = turn(pruned(name), second, cache), turn(pruned(name), second, copy.deepcopy(twin))
    assert all(a.equal(b) for a, b in zip(asked.logits, unasked.logits, strict=True))


def test_outside_of_a_block_and_after_restore() -> None:
    """On the very model that filled it; the next block goes on with it."""
    model, first, cache = zoo.build("qwen2_5_vl", layers=2), picture("qwen2_5_vl"), DynamicCache()
    with hawk_compile.pruned(model, ratio=0.6, backend="eager"):
        second = follow_up(first, turn(model, first, cache))
        expected = turn(model, second, copy.deepcopy(cache))
    refuse(model, cache, **token(cache))
    refuse(model.generate, cache, **second, max_new_tokens=2)
    with hawk_compile.pruned(model, ratio=0.6, backend="eager"):
        found = turn(model, second, copy.deepcopy(cache))
    assert all(a.equal(b) for a, b in zip(found.logits, expected.logits, strict=True))
    hawk_compile.optimize(model, ratio=0.6, backend="eager")
    refuse(hawk_compile.restore(model), cache, **token(cache))
    cache.reset()
    found = turn(model, first, cache)
    assert found.sequences.equal(turn(plain("qwen2_5_vl"), first, DynamicCache()).sequences)


def test_rows_that_were_moved_are_refused_too() -> None:
    name, cache = "llava", DynamicCache()
    turn(pruned(name), picture(name), cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-1)
    refuse(plain(name), cache, **token(cache))


def test_looking_is_free() -> None:
    """Lengths, layers and what they hold, outside of any call."""
    name, cache = "llava", DynamicCache()
    out = turn(pruned(name), picture(name), cache)
    kept = hawk_compile.report(cache).kept_tokens
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert cache.get_query_offset() == kept + 5 == cache.layers[0].keys.shape[2]
    assert [keys.shape[2] for keys, *_ in cache] == [kept + 5] * len(cache)
    assert cache.is_initialized and cache.get_max_length() == -1 and "DynamicLayer" in repr(cache)


def test_parts_of_an_optimised_model_and_compiled_plain_ones() -> None:
    """A body called past the forward that knows the cache; a plain model's own compiled graph."""
    name, cache = "llava", DynamicCache()
    turn(pruned(name), picture(name), cache)
    refuse(pruned(name).base_model, cache, **token(cache))
    refuse(torch.compile(zoo.build(name, layers=LAYERS), backend="eager"), cache, **token(cache))


def test_a_conversation_from_which_nothing_was_taken_goes_on() -> None:
    name, first, caches = "llava", picture("llava"), (DynamicCache(), DynamicCache())
    for model, cache in zip((fresh(name, 0), plain(name)), caches, strict=True):
        second = follow_up(first, turn(model, first, cache))
    found, expected = (turn(plain(name), second, cache) for cache in caches)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **ROUNDING)


def test_positions_of_its_own_are_enough() -> None:
    """mRoPE: with no token removed, the offset lies on the cache alone; the model may remember another's."""
    name, cache = "qwen2_5_vl", DynamicCache()
    turn(fresh(name, 0), picture(name), cache)
    refuse(plain(name), cache, **token(cache))


def test_another_thread_inside_a_forward() -> None:
    """While one conversation runs, another's cache is refused; and the first is again, when its step has failed."""
    name = "llava"
    model, running, waiting = fresh(name), DynamicCache(), DynamicCache()
    for cache in (running, waiting):
        turn(model, picture(name), cache)
    inside, refused = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        assert refused.wait(60)
        raise ZeroDivisionError

    def step() -> None:
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            model(**token(running), past_key_values=running)

    hook = model.base_model.get_decoder().layers[0].register_forward_pre_hook(stop)
    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert inside.wait(60)
        refuse(plain(name), waiting, **token(waiting))
    finally:
        refused.set()
        thread.join()
        hook.remove()
    refuse(plain(name), running, **token(running))
    with torch.no_grad():
        steps = [model(**token(cache), past_key_values=cache).logits for cache in (running, waiting)]
    assert steps[0].equal(steps[1])


def test_a_block_that_ends_while_another_thread_generates() -> None:
    """What it has begun it does not finish as a plain model."""
    model, cache, errors = zoo.build("llava", layers=2), DynamicCache(), []
    begun, ended = threading.Event(), threading.Event()

    def between_tokens(ids: Tensor, scores: Tensor) -> Tensor:
        begun.set()
        assert ended.wait(60)
        return scores

    def work() -> None:
        try:
            turn(model, picture("llava"), cache, logits_processor=[between_tokens])
        except UnsupportedCallError as error:
            errors.append(str(error))

    with hawk_compile.pruned(model, ratio=0.6, backend="eager"):
        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(60)
    ended.set()
    thread.join()
    assert len(errors) == 1 and errors[0].startswith("past_key_values holds a conversation of an optimised model")
