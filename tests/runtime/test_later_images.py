"""New images in a later turn on a filled cache: pruned by the new question, at the positions of the whole conversation.

Each conversation is held to the hand-written loop, which runs its prompts one behind another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import hawk_compile
from hawk_compile.compat.models import positions_for
from hawk_compile.errors import HawkError, UnsupportedCallError
from hawk_compile.runtime.later_images import positions_behind
from hawk_compile.tools.survey.tiny import build
from hawk_compile.tools.survey.tiny import prompt as inputs_of
from tests import zoo
from tests.marks import slow
from tests.runtime.models import RATIO, conversation, new_tokens, picture, plain, prompt, pruned, rows_alone
from tests.runtime.test_turns import QUESTION, check_logits, follow_up, turn
from tests.tiny import tiny
from tests.zoo import Row

MROPE = ("qwen2_5_vl", *slow("qwen2_vl", "qwen3_vl", "glm4v"))
IMAGES = zoo.sizes("qwen2_5_vl")
ONE, TWO = Row(images=IMAGES[2].images, after=4), Row(images=IMAGES[0].images + IMAGES[3].images, between=2)
VIDEO, BOTH = Row(video=(3, 2, 2)), Row(images=IMAGES[1].images, video=(2, 2, 3))


def later(name: str, first: dict[str, Tensor], out: Any, *rows: Row) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the conversation with a new prompt behind it, of which the pixels alone are given; the new prompt by itself)."""
    second = zoo.inputs(name, plain(name), rows=rows, seed=1)
    answer = out.sequences.shape[1] - first["input_ids"].shape[1]
    whole = {key: value for key, value in second.items() if key.startswith(("pixel", "image_", "video_"))}
    for key, filler in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in second:
            before = out.sequences if filler is None else torch.nn.functional.pad(first[key], (0, answer), value=filler)
            whole[key] = torch.cat([before, second[key]], 1)
    return whole, second


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("row", [TWO, *slow(ONE, VIDEO, BOTH)])
def test_a_later_turn_with_images(name: str, row: Row) -> None:
    """And a turn of text behind it."""
    if row is BOTH and name in ("qwen3_vl", "glm4v"):
        pytest.skip("images and video are not taken in one call")
    first, cache = picture(name), DynamicCache()
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    second, alone = later(name, first, out, row)
    answer = turn(pruned(name), second, cache)
    by_hand.prompt(alone)
    kept = hawk_compile.report(answer).keep_indices[0]
    assert kept[1:].sub(1).equal(by_hand.keep) and len(kept) <= alone["input_ids"].shape[1]
    check_logits(answer, by_hand, second)
    third = follow_up(second, answer)
    last = turn(pruned(name), third, cache)
    by_hand.feed(QUESTION)
    check_logits(last, by_hand, third)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_static_cache(name: str) -> None:
    first, cache = picture(name), StaticCache(config=plain(name).config.get_text_config(), max_cache_len=160)
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    second, alone = later(name, first, out, Row(images=zoo.sizes(name)[2].images, after=4))
    answer = turn(pruned(name), second, cache)
    by_hand.prompt(alone)
    check_logits(answer, by_hand, second)
    assert cache.get_query_offset() < cache.get_seq_length() == answer.sequences.shape[1] - 1


@pytest.mark.slow
def test_a_batch() -> None:
    """Rows of unequal length in both turns, one of them without an image in the second."""
    name = "qwen2_5_vl"
    rows = [Row(images=IMAGES[0].images, after=6), Row(images=IMAGES[0].images + IMAGES[4].images, after=2)]
    news = [TWO, Row(after=3)]
    first, cache = prompt(name, *rows), DynamicCache()
    out = turn(pruned(name), first, cache)
    second, alone = later(name, first, out, *news)
    answer = turn(pruned(name), second, cache)
    assert (second["attention_mask"][:, first["input_ids"].shape[1] :] == 0).any()
    for i, single in enumerate(rows_alone(name, first, rows)):
        by_hand = conversation(name, single)
        check_logits(out, by_hand, first, i)
        by_hand.prompt(rows_alone(name, alone, news)[i]) if i == 0 else by_hand.feed(text_of(alone, i))
        check_logits(answer, by_hand, second, i)


def text_of(inputs: dict[str, Tensor], row: int) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
def test_images_of_a_later_turn_that_stay_whole(name: str) -> None:
    """By ratio=0, and by settings that do not prune images."""
    for settings in ({"ratio": 0.0}, {"ratio": RATIO, "modalities": ("video",)}):
        first, cache = picture(name), DynamicCache()
        out = turn(pruned(name), first, cache)
        by_hand = conversation(name, first)
        check_logits(out, by_hand, first)
        second, alone = later(name, first, out, ONE)
        hawk_compile.optimize(pruned(name), backend="eager", **settings)
        try:
            answer = turn(pruned(name), second, cache)
            by_hand.ratio = 0
            by_hand.prompt(alone)
            check_logits(answer, by_hand, second)
        finally:
            hawk_compile.optimize(pruned(name), ratio=RATIO, backend="eager")
        third = follow_up(second, answer)
        last = turn(pruned(name), third, cache)
        by_hand.feed(QUESTION)
        check_logits(last, by_hand, third)


@pytest.mark.slow
def test_ids_of_a_later_turn_alone() -> None:
    """With a mask of the whole conversation, as generate wants it."""
    name, cache = "qwen2_5_vl", DynamicCache()
    first = picture(name)
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    second, alone = later(name, first, out, ONE)
    past = out.sequences.shape[1] - 1  # the last token is not in the cache
    given = second | {key: second[key][:, past:] for key in ("input_ids", "mm_token_type_ids")}
    answer = turn(pruned(name), given, cache)
    by_hand.prompt(alone)
    check_logits(answer, by_hand, given)


@pytest.mark.slow
@pytest.mark.parametrize("which", [2, 4])
def test_images_of_earlier_turns_given_again_are_refused(which: int) -> None:
    """Whether the new image is as large as the one that the cache holds, or not."""
    name, cache = "qwen2_5_vl", DynamicCache()
    first = picture(name)
    out = turn(pruned(name), first, cache)
    second, _ = later(name, first, out, zoo.sizes(name)[which])
    again = {key: torch.cat([first[key], second[key]]) for key in ("pixel_values", "image_grid_thw")}
    held = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(HawkError, match=r"exactly these (images|placeholders)"):
        turn(pruned(name), second | again, cache)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, held, strict=True))


@pytest.mark.slow
def test_a_forward_without_positions() -> None:
    name, cache = "qwen2_5_vl", DynamicCache()
    first = picture(name)
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    pruned(name)(input_ids=out.sequences[:, -1:], past_key_values=cache)
    held = [layer.keys.clone() for layer in cache.layers]
    _, alone = later(name, first, out, TWO)
    given = {key: value for key, value in alone.items() if key != "attention_mask"}
    for missing in ("mm_token_type_ids", "image_grid_thw"):
        with pytest.raises(UnsupportedCallError, match=r"need position_ids .* give what the processor returns"):
            pruned(name)(**{key: value for key, value in given.items() if key != missing}, past_key_values=cache)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, held, strict=True))
    result = pruned(name)(**given, past_key_values=cache)
    torch.testing.assert_close(result.logits[0], by_hand.prompt(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_assisted_decoding_in_a_later_turn_with_images() -> None:
    name, cache = "qwen2_5_vl", DynamicCache()
    first = picture(name)
    out = turn(pruned(name), first, cache, prompt_lookup_num_tokens=3)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    second, alone = later(name, first, out, ONE)
    answer = turn(pruned(name), second, cache, prompt_lookup_num_tokens=3)
    by_hand.prompt(alone)
    check_logits(answer, by_hand, second)
    assert len(new_tokens(answer, second)) == 6


COUNTED_OTHERWISE = ("hunyuan_vl", "hunyuan_vl.three_axes")
"""Rows and columns are counted from each image's corner, and images over the conversation."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "glm46v", "glm4v", "glm4v_moe", "glm_ocr",
    "hunyuan_vl", "hunyuan_vl.three_axes", "minicpmv4_7", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_vl",
    "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp",
])  # fmt: skip
def test_positions_are_those_of_the_whole_conversation(name: str) -> None:
    """As the model gives them to a prompt of both turns, of which all sizes are given."""
    described = tiny(name)
    model, first = build(described), inputs_of(described, rows=[0])
    length = first["input_ids"].shape[1]
    whole = {
        key: torch.cat([value, value], 1 if value.shape == (1, length) else 0) if isinstance(value, Tensor) else value
        for key, value in first.items()
    }
    asked = {key: value for key, value in first.items() if key not in ("attention_mask",)}
    mask = {"attention_mask": torch.ones_like(whole["input_ids"])}
    axes = positions_for(model, first["input_ids"], {**asked, "attention_mask": torch.ones(1, length).long()})
    delta = (axes[-3:].max() + 1 - length).view(1, 1)
    expected = positions_for(model, whole["input_ids"], {**whole, **mask})[..., length:]
    model.base_model.rope_deltas = delta
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), 0)
    if name in COUNTED_OTHERWISE:
        with pytest.raises(UnsupportedCallError, match="counts them, or their rows and columns, in a way"):
            positions_behind(model, cache, {**asked, **mask})
        return
    found = positions_behind(model, cache, {**asked, **mask})
    assert found.equal(expected[-found.shape[0] :])
