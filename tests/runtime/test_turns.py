"""Conversations of several turns, interleaved ones, and threads: each equals its hand-written loop."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import hawk_compile
from tests import zoo
from tests.marks import slow
from tests.runtime.models import (
    EVERY,
    ROUNDING,
    conversation,
    generate,
    new_tokens,
    picture,
    plain,
    prompt,
    pruned,
    rows_alone,
)
from tests.runtime.reference import Conversation
from tests.zoo import Row

QUESTION = [60, 61, 62, 63, 64]


def turn(model: Any, inputs: dict[str, Tensor], cache: Cache, tokens: int = 6, **options: Any) -> Any:
    return generate(model, inputs, tokens, past_key_values=cache, **options)


def follow_up(inputs: dict[str, Tensor], out: Any, question: list[int] = QUESTION) -> dict[str, Tensor]:
    """The conversation so far and the next question, as a chat template would give it: text, and no pictures."""
    asked = torch.tensor(question).expand(out.sequences.shape[0], -1)
    ids = torch.cat([out.sequences, asked], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, more))
    return longer


def check_logits(out: Any, by_hand: Any, inputs: dict[str, Tensor], row: int = 0) -> None:
    """Each step's logits, the hand-written loop being fed what was generated."""
    for token, logits in zip(new_tokens(out, inputs, row), out.logits, strict=True):
        torch.testing.assert_close(logits[row], by_hand.logits[-1], **ROUNDING)
        by_hand.feed([token])


@pytest.mark.parametrize("name", EVERY)
def test_second_turn_of_text(name: str) -> None:
    first, cache = picture(name), DynamicCache(config=plain(name).config.get_text_config())
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    kept = len(by_hand.keep)
    check_logits(out, by_hand, first)  # feeds the last token too, which a second turn prefills with its question
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert cache.get_query_offset() == kept + 5
    second = follow_up(first, out)
    if name == "paligemma":
        second.pop("token_type_ids")  # its answers and questions are a suffix, which attends causally
    later = turn(pruned(name), second, cache)
    by_hand.feed(QUESTION)
    check_logits(later, by_hand, second)
    assert hawk_compile.report(pruned(name)).kept_tokens == kept  # the last prefill of pictures is still the first


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava")])
def test_second_turn_with_a_new_image(name: str) -> None:
    """Only the new image is encoded, scored by the new question and pruned; the first turn stays as it was."""
    first, cache = picture(name), DynamicCache()
    out = turn(pruned(name), first, cache)
    by_hand = conversation(name, first)
    check_logits(out, by_hand, first)
    second = zoo.inputs(name, plain(name), rows=[Row(images=zoo.sizes(name)[2].images, after=4)], seed=1)
    offset = by_hand.next_position
    alone = plain(name)._prepare_position_ids_for_generation(second["input_ids"], dict(second))
    new = torch.cat([out.sequences[:, -1:], second["input_ids"]], 1)
    if alone.ndim == 3:
        text = torch.arange(new.shape[1])[None, None] + cache.get_seq_length()
        position_ids = torch.cat([torch.full((3, 1, 1), offset - 1), alone[1:] + offset], 2)
        position_ids = torch.cat([text, position_ids])
    else:
        position_ids = torch.arange(new.shape[1])[None] + cache.get_seq_length()
    inputs = {key: value for key, value in second.items() if key in ("pixel_values", "image_grid_thw")}
    result = pruned(name)(input_ids=new, position_ids=position_ids, past_key_values=cache, **inputs)
    expected = by_hand.prompt(second)
    report = hawk_compile.report(pruned(name))
    assert report.keep_indices[0][1:].sub(1).equal(by_hand.keep) and report.keep_indices[0][0] == 0
    assert report.kept_visual_tokens < report.visual_tokens
    torch.testing.assert_close(result.logits[0, 1:], expected, **ROUNDING)
    assert cache.get_seq_length() == out.sequences.shape[1] + second["input_ids"].shape[1]
    # a step without positions: the model works them out from this conversation's offsets
    pruned(name)(**picture(name, 3))
    step = pruned(name)(input_ids=torch.tensor([[70]]), past_key_values=cache)
    torch.testing.assert_close(step.logits[0], by_hand.feed([70]), **ROUNDING)


def test_image_after_a_turn_of_text() -> None:
    name = "llava"
    cache = DynamicCache()
    text = zoo.text_only(name, plain(name))
    turn(pruned(name), text, cache, 1)
    second = zoo.inputs(name, plain(name), rows=[Row(images=((1, 1),), after=4)], seed=1)
    ids = torch.cat([text["input_ids"], second["input_ids"]], 1)
    whole = {"input_ids": ids, "pixel_values": second["pixel_values"]}
    later = turn(pruned(name), whole, cache, 4)
    reference = Conversation(plain(name), 0.6)
    with torch.no_grad():
        reference.feed(text["input_ids"][0].tolist())
    reference.prompt(second)
    check_logits(later, reference, whole)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", *slow("llava")])
def test_two_turns_of_a_batch(name: str) -> None:
    """Left-padded rows with unequal visual counts, two turns on one cache."""
    sizes = zoo.sizes(name)
    both = [Row(images=sizes[0].images, after=6), Row(images=sizes[0].images + sizes[4].images, after=2)]
    inputs, cache = prompt(name, *both), DynamicCache(config=plain(name).config.get_text_config())
    out = turn(pruned(name), inputs, cache)
    second = follow_up(inputs, out)
    later = turn(pruned(name), second, cache)
    for i, single in enumerate(rows_alone(name, inputs, both)):
        by_hand = conversation(name, single)
        check_logits(out, by_hand, inputs, i)
        by_hand.feed(QUESTION)
        check_logits(later, by_hand, second, i)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_two_turns_with_ratio_0_are_those_of_the_plain_model(name: str) -> None:
    model = hawk_compile.optimize(pruned(name), ratio=0, backend="eager")
    try:
        inputs = prompt(name, *zoo.sizes(name)[:2], Row(after=3))
        results = []
        for each in (model, plain(name)):
            cache = DynamicCache(config=each.config.get_text_config())
            out = turn(each, inputs, cache)
            results.append(turn(each, follow_up(inputs, out), cache))
        assert results[0].sequences.equal(results[1].sequences)
        assert all(a.equal(b) for a, b in zip(results[0].logits, results[1].logits, strict=True))
    finally:
        hawk_compile.optimize(model, ratio=0.6, backend="eager")


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("glm4v", "llava")])
def test_interleaved_conversations(name: str) -> None:
    """A1 (a picture), B1 (text), C1 (another picture), A2, B2, C2 on one model: as if each were alone.

    The second turns are steps without positions, for which a model with mRoPE adds its conversation's offset.
    """
    prompts = [picture(name, 4), zoo.text_only(name, plain(name)), picture(name, 2)]
    for inputs in prompts[0], prompts[2]:
        assert inputs["input_ids"].shape[1] > 8
    caches = [DynamicCache() for _ in prompts]
    with torch.no_grad():
        outs = [turn(pruned(name), inputs, cache) for inputs, cache in zip(prompts, caches, strict=True)]
        seconds = [follow_up(inputs, out) for inputs, out in zip(prompts, outs, strict=True)]
        laters = [turn(pruned(name), inputs, cache) for inputs, cache in zip(seconds, caches, strict=True)]
        steps = [pruned(name)(input_ids=torch.tensor([[70]]), past_key_values=cache) for cache in caches]
        for i in (0, 2):
            by_hand = conversation(name, prompts[i])
            check_logits(outs[i], by_hand, prompts[i])
            by_hand.feed(QUESTION)
            tokens = new_tokens(laters[i], seconds[i])
            for token, logits in zip(tokens, laters[i].logits, strict=True):
                torch.testing.assert_close(logits[0], by_hand.logits[-1], **ROUNDING)
                if token is not tokens[-1] or len(by_hand.logits) == 0:
                    by_hand.feed([token])
        alone = zoo.build(name, layers=2)
        cache = DynamicCache()
        out = turn(alone, prompts[1], cache)
        later = turn(alone, follow_up(prompts[1], out), cache)
        step = alone(input_ids=torch.tensor([[70]]), past_key_values=cache)
        assert later.sequences.equal(laters[1].sequences)
        torch.testing.assert_close(torch.stack(later.logits), torch.stack(laters[1].logits), atol=0, rtol=0)
        torch.testing.assert_close(steps[1].logits, step.logits, **ROUNDING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava")])
def test_threads(name: str) -> None:
    """Conversations on one model in several threads: results and reports of each are those it has alone."""
    prompts = [picture(name, which) for which in (0, 4, 2, 5)]
    expected = [two_turns(name, inputs) for inputs in prompts]
    found: dict[int, Any] = {}
    start = threading.Barrier(len(prompts))

    def work(index: int) -> None:
        start.wait()
        for _ in range(3):
            found[index] = two_turns(name, prompts[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (tokens, logits, kept) in enumerate(expected):
        assert found[i][0] == tokens and found[i][2] == kept
        torch.testing.assert_close(found[i][1], logits, atol=0, rtol=0)


def two_turns(name: str, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor, list[int]]:
    cache = DynamicCache(config=plain(name).config.get_text_config())
    out = turn(pruned(name), inputs, cache)
    later = turn(pruned(name), follow_up(inputs, out), cache)
    report = hawk_compile.report(later)
    return later.sequences[0].tolist(), torch.stack([*out.logits, *later.logits]), report.keep_indices[0].tolist()
