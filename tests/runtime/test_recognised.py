"""A cache that others make of a pruned one is refused, whatever they made it by; one that was never pruned is not."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import hawk_compile
from hawk_compile.capture.modalities import positions_by_images
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime import recognised
from hawk_compile.runtime.positions import axes_of
from tests import zoo
from tests.marks import slow
from tests.runtime.models import ROUNDING, fresh, generate, picture, plain, prompt, pruned
from tests.runtime.test_turns import follow_up, turn

REBUILT = "past_key_values holds keys of a prompt that was pruned, in a cache that others have made of them"
NAMES = ["llava", "qwen2_5_vl", *slow("gemma3", "qwen3_vl")]


def cloned(cache: Any) -> Any:
    return DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])


def updated(cache: Any) -> Any:
    new = DynamicCache()
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


def fixed(cache: Any) -> Any:
    new = StaticCache(config=plain("llava").config.get_text_config(), max_cache_len=120)
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


def with_its_layers(cache: Any) -> Any:
    new = DynamicCache()
    new.layers = list(cache.layers)
    return new


def cut(cache: Any) -> Any:
    """To all of the prompt but its last token."""
    held = cache.hawk_conversation.slots.positions.shape[1] - 1
    return DynamicCache([(layer.keys[:, :, :held], layer.values[:, :, :held]) for layer in cache.layers])


def less_exact(cache: Any) -> Any:
    return DynamicCache([(layer.keys.half(), layer.values.half()) for layer in cache.layers])


def refuse(model: Any, cache: Any, later: dict[str, Tensor]) -> None:
    held = [layer.keys.clone() for layer in cache.layers]
    for call in (
        lambda: turn(model, later, cache),
        lambda: model(input_ids=torch.tensor([[60, 61]]), past_key_values=cache),
        lambda: model(input_ids=torch.tensor([[60]]), attention_mask=later["attention_mask"], past_key_values=cache),
    ):
        with pytest.raises(UnsupportedCallError, match=REBUILT):
            call()
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, held, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_made_anew_is_refused(name: str) -> None:
    model, inputs = pruned(name), picture(name)
    out = turn(model, inputs, DynamicCache())
    later = follow_up(inputs, out)
    for change in (cloned, updated, with_its_layers, cut, less_exact, *([fixed] if name == "llava" else [])):
        refuse(model, change(out.past_key_values), later)
    whole = copy.deepcopy(out.past_key_values)
    later.pop("token_type_ids", None)
    assert turn(model, later, whole).sequences.shape[1] == later["input_ids"].shape[1] + 6


def test_rows_and_later_settings() -> None:
    """Rows that others have put together, one of them pruned; and a model that was optimised anew."""
    name = "llava"
    model, sizes = fresh(name), zoo.sizes(name)
    inputs = prompt(name, zoo.Row(images=sizes[0].images), zoo.Row(images=sizes[0].images + sizes[4].images))
    cache = turn(model, inputs, DynamicCache(), 2).past_key_values
    hawk_compile.optimize(model, ratio=0.3, backend="eager")
    for rows in ([0], [1], [1, 0, 1]):
        new = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])
        with pytest.raises(UnsupportedCallError, match=REBUILT):
            model(input_ids=torch.full((len(rows), 1), 60), past_key_values=new)


def test_a_pruned_cache_that_was_given_its_old_class_back() -> None:
    name = "llava"
    model = fresh(name)
    cache = turn(model, prompt(name, zoo.Row(images=zoo.sizes(name)[4].images)), DynamicCache(), 2).past_key_values
    cache.__class__ = DynamicCache
    with pytest.raises(UnsupportedCallError, match=REBUILT):
        model(input_ids=torch.full((1, 1), 60), past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_was_not_pruned_goes_on(name: str) -> None:
    """The same prompt by the plain model, padded or not; and the text in front of an image, cut off a pruned cache."""
    model, inputs = pruned(name), picture(name)
    out = turn(model, inputs, DynamicCache())
    axes = axes_of(model) if positions_by_images(model) else 1

    def step(of: Any, cache: Any, mask: Tensor) -> Tensor:
        """With positions, for which models of mRoPE would take the offset of the last prompt that they saw."""
        place = mask.sum(1, keepdim=True) - 1
        places = place.expand(axes, -1, -1) if axes > 1 else place
        ids = torch.full_like(place, 60)
        return of(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits

    for given in (inputs, prompt(name, zoo.sizes(name)[4], zoo.sizes(name)[0])):
        cache = generate(plain(name), given, 1, past_key_values=DynamicCache()).past_key_values
        mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
        found = step(model, cloned(cache), mask)
        torch.testing.assert_close(found, step(plain(name), cache, mask), **ROUNDING)
    moved = int(model._hawk_runtime.moved[-1].slots[0])
    assert 0 < moved < len(hawk_compile.report(out).keep_indices[0])
    for first, refused in ((moved, False), (moved + 1, True)):
        cache = DynamicCache([
            (layer.keys[:, :, :first], layer.values[:, :, :first]) for layer in out.past_key_values.layers
        ])
        mask = torch.ones(1, first + 1, dtype=torch.int64)
        with pytest.raises(UnsupportedCallError, match=REBUILT) if refused else contextlib.nullcontext():
            step(model, cache, mask)


@torch.no_grad()
def test_a_cache_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which waits for the device: never for what optimised models have filled, and never at a step."""
    looks: list[Any] = []
    holds = recognised.holds
    monkeypatch.setattr(recognised, "holds", lambda *args: looks.append(args) or holds(*args))
    model, text = pruned("llava"), zoo.text_only("llava", plain("llava"))
    turn(model, picture("llava"), DynamicCache())
    turn(model, text, DynamicCache())
    assert not looks
    cache = DynamicCache()
    plain("llava")(input_ids=text["input_ids"], past_key_values=cache)
    for _ in range(3):
        model(input_ids=torch.tensor([[60]]), past_key_values=cache)
    assert len(looks) == 1


@torch.no_grad()
def test_what_is_remembered_has_a_bound() -> None:
    model = fresh("llava")
    assert model._hawk_runtime.moved.maxlen == recognised.MOST
    for _ in range(3):
        model(**picture("llava"))
    held = model._hawk_runtime.moved
    assert len(held) == 3 and held[0].keys.shape[0] == 1 and held[0].keys.untyped_storage().nbytes() < 10_000
    model(**picture("llava"), use_cache=False)
    hawk_compile.optimize(model, ratio=0.0, backend="eager")
    model(**picture("llava"))
    assert len(held) == 3
