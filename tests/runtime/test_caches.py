"""Every kind of cache after a pruned prompt: the hand-written loop's logits, and its methods keep the state along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

import hawk_compile
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime import prefill
from hawk_compile.runtime.conversation import Slots
from hawk_compile.runtime.handover import scratch_cache
from hawk_compile.versions import installed, release
from tests import zoo
from tests.marks import slow
from tests.runtime.models import (
    MAIN,
    ROUNDING,
    conversation,
    fresh,
    generate,
    new_tokens,
    picture,
    plain,
    prompt,
    pruned,
)
from tests.runtime.test_turns import QUESTION, check_logits, follow_up, turn

FIRST_FP8 = "5.21"
"""The first transformers whose quantised cache has the backend fp8."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen2_5_vl" else pytest.mark.slow) for name in MAIN])  # fmt: skip
def test_static_cache(name: str) -> None:
    inputs = picture(name)
    out = generate(pruned(name), inputs, 12, cache_implementation="static")
    check_logits(out, conversation(name, inputs), inputs)
    assert isinstance(out.past_key_values, StaticCache)


@pytest.mark.parametrize("name", [*slow("llava"), "gemma3"])
def test_static_cache_is_of_the_pruned_length(name: str) -> None:
    """What generate asks for less what was removed; a smaller prompt later gets no cache of another size."""
    model, sizes = fresh(name), []
    longer, shorter = sorted((picture(name, 4), picture(name, 2)), key=lambda each: -each["input_ids"].shape[1])
    for inputs in (longer, shorter):
        out = generate(model, inputs, 5, cache_implementation="static")
        check_logits(out, conversation(name, inputs), inputs)
        kept = hawk_compile.report(model).kept_tokens
        assert kept < inputs["input_ids"].shape[1]
        sizes.append([layer.keys.shape[2] for layer in out.past_key_values.layers])
        if len(sizes) == 1:
            window = getattr(model.config.get_text_config(), "sliding_window", None) or kept + 4
            assert set(sizes[0]) == {kept + 4, min(window, kept + 4)}
    assert sizes[0] == sizes[1]


def test_a_static_cache_of_one_call_serves_another_after_reset() -> None:
    model, inputs = fresh("llava"), picture("llava")
    cache = generate(model, inputs, 2, cache_implementation="static").past_key_values
    assert cache.layers[0].keys.shape[2] < inputs["input_ids"].shape[1]
    cache.reset()
    hawk_compile.optimize(model, ratio=0.2, backend="eager")
    found = generate(model, inputs, 2, past_key_values=cache)
    assert found.sequences.equal(generate(model, inputs, 2).sequences)


def test_a_static_cache_of_a_given_length_keeps_it() -> None:
    out = generate(fresh("llava"), picture("llava"), 2, cache_implementation="static", max_cache_len=90)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {90}


def test_generate_compiles_the_step_of_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own `compile_config`, as on CUDA without being asked: one graph, and the logits of the eager step."""
    from torch._dynamo.backends import registry

    graphs = []
    real = registry.lookup_backend("eager")
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", lambda gm, inputs, **_: graphs.append(gm) or real(gm, inputs))
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    model, inputs = fresh("llava"), picture("llava")
    generate(model, inputs, 1)
    del graphs[:]
    for _ in range(2):
        out = generate(model, inputs, 6, cache_implementation="static", compile_config=compiling)
        check_logits(out, conversation("llava", inputs), inputs)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3")])
def test_own_static_cache_and_two_turns(name: str) -> None:
    inputs = picture(name)
    cache = StaticCache(config=plain(name).config.get_text_config(), max_cache_len=128)
    out = turn(pruned(name), inputs, cache)
    by_hand = conversation(name, inputs)
    check_logits(out, by_hand, inputs)
    second = follow_up(inputs, out)
    later = turn(pruned(name), second, cache)
    by_hand.feed(QUESTION)
    check_logits(later, by_hand, second)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3")])
def test_static_cache_of_a_padded_batch(name: str) -> None:
    inputs = prompt(name, *zoo.sizes(name)[:3])
    out = generate(pruned(name), inputs, 6, cache_implementation="static")
    expected = generate(pruned(name), inputs, 6)
    assert out.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), **ROUNDING)


def test_plain_cache_for_sliding_layers() -> None:
    """A DynamicCache without a config keeps everything; masks slide all the same."""
    inputs = picture("gemma3")
    out = turn(pruned("gemma3"), inputs, DynamicCache(), 20)
    check_logits(out, conversation("gemma3", inputs), inputs)


@pytest.mark.parametrize("given", [None, DynamicCache()])
def test_a_plain_cache_takes_keys_and_values_without_a_copy(
    given: DynamicCache | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors that the graph wrote, of which no other cache may know."""
    made: list[Any] = []
    monkeypatch.setattr(prefill, "scratch_cache", lambda *given: made.append(scratch_cache(*given)) or made[-1])
    with torch.no_grad():
        found = pruned("llava")(**picture("llava"), past_key_values=given).past_key_values
    assert given is None or found is given
    for mine, written in zip(found.layers, made[0].layers, strict=True):
        assert mine.keys is written.keys and mine.values is written.values
        assert mine.keys.is_contiguous() and mine.values.is_contiguous()


def test_quantized_cache() -> None:
    """fp8 needs no other package; the same keys and values are rounded the same way by hand."""
    config = plain("llava").config.get_text_config()
    inputs = picture("llava")
    options: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if release(installed("transformers")) < release(FIRST_FP8):  # which says so itself
        with pytest.raises(ValueError, match="Unknown quantization backend `fp8`"):
            generate(pruned("llava"), inputs, 6, **options)
        return
    out = generate(pruned("llava"), inputs, 6, **options)
    check_logits(out, conversation("llava", inputs, cache=QuantizedCache(backend="fp8", config=config)), inputs)
    unrounded = generate(pruned("llava"), inputs, 6)
    assert not torch.allclose(out.logits[-1], unrounded.logits[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava", "paligemma")])
def test_without_cache(name: str) -> None:
    """Each step prefills anew; what was generated must not vote, so the same tokens are kept each time."""
    row = zoo.Row(images=zoo.sizes(name)[4].images, tail=None)  # no end of turn keeps generated text from voting
    inputs = prompt(name, row)
    expected, kept = generate(pruned(name), inputs, 5), hawk_compile.report(pruned(name)).keep_indices[0]
    out = generate(pruned(name), inputs, 5, use_cache=False)
    again = hawk_compile.report(pruned(name)).keep_indices[0]
    assert out.past_key_values is None
    assert again[: len(kept)].equal(kept) and len(again) == len(kept) + 4
    if name != "paligemma":  # its whole prompt attends both ways, generated tokens too if they are prefilled
        assert out.sequences.equal(expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), **ROUNDING)


def test_forward_without_cache() -> None:
    result = pruned("llava")(**picture("llava"), use_cache=False)
    assert result.past_key_values is None
    torch.testing.assert_close(result.logits[0], conversation("llava", picture("llava")).logits, **ROUNDING)


def step(name: str, cache: Any, tokens: list[list[int]]) -> torch.Tensor:
    """A step on an already padded batch's cache, with a mask over the whole conversation and no positions."""
    ids = torch.tensor(tokens)
    with torch.no_grad():
        return pruned(name)(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_copies_are_independent(name: str) -> None:
    cache = DynamicCache()
    out = turn(pruned(name), picture(name), cache)
    twin = copy.deepcopy(cache)
    first = step(name, cache, [[70]])
    step(name, cache, [[71]])
    assert twin.get_seq_length() == out.sequences.shape[1] - 1 == cache.get_seq_length() - 2
    torch.testing.assert_close(step(name, twin, [[70]]), first, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_rows_of_a_cache(name: str) -> None:
    """Repeated, selected and reordered rows go on as the rows they came from."""
    sizes = zoo.sizes(name)
    inputs = prompt(name, zoo.Row(images=sizes[0].images), zoo.Row(images=sizes[0].images + sizes[4].images))
    cache = DynamicCache()
    out = turn(pruned(name), inputs, cache, 2)
    last = out.sequences[:, -1:]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)

    def go_on(held: Any, order: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return pruned(name)(input_ids=last[order], attention_mask=mask[order], past_key_values=held).logits

    expected = go_on(copy.deepcopy(cache), [0, 1])
    assert not torch.allclose(expected[0], expected[1])
    for order, change in (
        ([0, 0, 1, 1], lambda held: held.batch_repeat_interleave(2)),
        ([1], lambda held: held.batch_select_indices(torch.tensor([1]))),
        ([1, 0], lambda held: held.reorder_cache(torch.tensor([1, 0]))),
        ([1, 1], lambda held: held.reorder_cache(torch.tensor([1, 1]))),
    ):
        held = copy.deepcopy(cache)
        change(held)
        torch.testing.assert_close(go_on(held, order), expected[order], **ROUNDING)


def test_crop() -> None:
    """What came after the prompt can be taken back, and the text that ends it; what was pruned cannot."""
    name, cache = "qwen2_5_vl", DynamicCache()
    inputs = picture(name)
    out = turn(pruned(name), inputs, cache, 5)  # 4 of the 5 new tokens are in the cache
    text = int(zoo.visual_mask(name, plain(name), inputs)[0].flip(0).long().argmax())  # behind the last visual token
    untouched = [layer.keys.clone() for layer in cache.layers]
    for count in (4 + text + 2, 1000):
        with pytest.raises(UnsupportedCallError, match=rf"crop\(-{count}\) would leave .* reach what was pruned"):
            cache.crop(-count)
    with pytest.raises(InputError, match=r"as a negative number, got 3: give -3"):
        cache.crop(3)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, untouched, strict=True))
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    cache.crop(-3)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1 - 3
    twin = copy.deepcopy(cache)
    by_hand = conversation(name, inputs)
    by_hand.feed(new_tokens(out, inputs)[:1])
    torch.testing.assert_close(step(name, cache, [[90]])[0], by_hand.feed([90]), **ROUNDING)
    cache.crop(0)
    twin.crop(-1 - text)
    assert twin.get_seq_length() == inputs["input_ids"].shape[1] - text
    again = inputs["input_ids"][0, -text:].tolist()
    torch.testing.assert_close(step(name, twin, [again])[0], conversation(name, inputs).logits[-text:], **ROUNDING)


def test_reset() -> None:
    cache = DynamicCache()
    turn(pruned("qwen2_5_vl"), picture("qwen2_5_vl"), cache)
    assert type(cache) is not DynamicCache and isinstance(cache, DynamicCache)
    cache.reset()
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0
    out = turn(pruned("qwen2_5_vl"), picture("qwen2_5_vl", 2), cache)
    check_logits(out, conversation("qwen2_5_vl", picture("qwen2_5_vl", 2)), picture("qwen2_5_vl", 2))


def test_new_image_needs_plain_layers() -> None:
    cache = DynamicCache(config=plain("gemma3").config.get_text_config())
    out = turn(pruned("gemma3"), picture("gemma3"), cache)
    ids = torch.cat([out.sequences, picture("gemma3")["input_ids"]], 1)
    with pytest.raises(UnsupportedCallError, match="StaticCache of plain layers, got DynamicLayer, DynamicSliding"):
        generate(pruned("gemma3"), {"input_ids": ids, "pixel_values": picture("gemma3")["pixel_values"]}, 2,
                 past_key_values=cache)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3")])
def test_decode_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph of the decode step for prompts of any length; the tokens are those of uncompiled decoding."""
    from torch._dynamo.backends import registry

    graphs = []
    real = registry.lookup_backend("eager")

    def counting(gm: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        graphs.append(gm)
        return real(gm, example_inputs)

    model = fresh(name, compile_decode=True)
    prompts = [picture(name, which) for which in range(6)]
    expected = [generate(pruned(name), inputs, 8).sequences for inputs in prompts]
    generate(model, prompts[0], 1)  # the prefill, which is not counted
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", counting)
    assert all(generate(model, inputs, 8).sequences.equal(e) for inputs, e in zip(prompts, expected, strict=True))
    assert model._hawk_runtime.compilations == 1
    assert len(graphs) == 1


@pytest.mark.parametrize("options", [{}, pytest.param({"cache_implementation": "static"}, marks=pytest.mark.slow)])
def test_chunks_of_a_prefill(options: dict[str, Any]) -> None:
    """A prompt that is pruned is prefilled at once: its chunks cannot be scored."""
    inputs, model = picture("llava"), fresh("llava")
    expected = generate(model, inputs, 6, **options)
    kept, compiled = hawk_compile.report(expected).keep_indices[0], model._hawk_runtime.compilations
    with pytest.warns(UserWarning, match="prefill_chunk_size=8 is passed over"):
        out = generate(model, inputs, 6, prefill_chunk_size=8, **options)
    assert torch.stack(out.logits).equal(torch.stack(expected.logits)) and out.sequences.equal(expected.sequences)
    assert hawk_compile.report(out).keep_indices[0].equal(kept) and model._hawk_runtime.compilations == compiled
    check_logits(out, conversation("llava", inputs), inputs)


@pytest.mark.parametrize(("positions", "valid", "left"), [
    ([0, 1, 2, 3], [True, False, False, False], 3),  # the prompt ends in padding
    ([0, 2, 3, 3], [True, True, True, False], None),  # the last slot fills the row up
    ([0, 2, 3], None, 2),
    ([0, 1, 2], None, None),  # the last of four tokens was pruned
])  # fmt: skip
def test_what_a_crop_may_take(positions: list[int], valid: list[bool] | None, left: int | None) -> None:
    slots = Slots(torch.tensor([positions]), None if valid is None else torch.tensor([valid]), 4)
    cropped = slots.without_last(1)
    assert (None if cropped is None else (cropped.positions.shape[1], cropped.logical)) == (left and (left, 3))
