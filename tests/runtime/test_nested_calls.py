"""Forwards that others make while generate runs (a logits processor that looks at another picture, a criterion, a
streamer) are what they are by themselves, and generate's own are what they are without them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import hawk_compile
from tests import zoo
from tests.marks import slow
from tests.runtime.models import ROUNDING, fresh, generate, picture, prompt, pruned
from tests.runtime.test_assisted import drafting
from tests.zoo import Row

NO_CACHE = {"use_cache": False}


def longer(name: str) -> dict[str, Tensor]:
    return prompt(name, Row(images=zoo.sizes(name)[4].images, before=3, after=40), seed=5)


def other_picture(name: str) -> dict[str, Tensor]:
    """The same ids with another picture, as visual contrastive decoding asks of."""
    inputs = picture(name)
    return {**inputs, "pixel_values": inputs["pixel_values"].flip(0, -1)}


def some_of(inputs: dict[str, Tensor], start: int = 1) -> Tensor:
    """A question that nobody would find by the ids alone."""
    mask = torch.zeros_like(inputs["input_ids"])
    mask[0, start : start + 2] = 1
    return mask


class Asks(BaseStreamer):
    """Calls a function at each step: as a logits processor, as a stopping criterion or as a streamer."""

    def __init__(self, ask: Any):
        self.ask, self.found, self.prompt = ask, [], True

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.found.append(self.ask())
        return scores

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.found.append(self.ask())
        self.prompt = False

    def end(self) -> None:
        pass


def ways(asks: Asks) -> list[dict[str, Any]]:
    never = lambda ids, scores, **kwargs: asks(ids, torch.zeros(len(ids), dtype=torch.bool))  # noqa: E731
    return [{"logits_processor": [asks]}, {"stopping_criteria": [never]}, {"streamer": asks}]


@torch.no_grad()
def scores_of(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    output = model(**inputs, **options)
    return hawk_compile.report(output).scores, output.logits


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, **ROUNDING)


@pytest.mark.parametrize("options", [NO_CACHE, {}])
@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl")])
def test_another_prompt_is_asked_as_by_itself(name: str, options: dict[str, Any]) -> None:
    model, inputs = pruned(name), picture(name)
    question = some_of(inputs)
    expected = generate(model, inputs, 3, question_mask=question, **options)
    for place, other in enumerate((longer(name), other_picture(name), longer(name))):
        alone = scores_of(model, other)
        asks = Asks(lambda other=other: scores_of(model, other))
        out = generate(model, inputs, 3, question_mask=question, **options, **ways(asks)[place])
        assert out.sequences.equal(expected.sequences) and len(asks.found) >= 3
        same(out.logits, expected.logits)
        assert hawk_compile.report(out).scores.equal(hawk_compile.report(expected).scores)
        for found in asks.found:
            same(found, alone)


def test_beside_a_question_of_ids_and_with_beams() -> None:
    model, inputs, other = pruned("llava"), picture("llava"), longer("llava")
    asked = {"question_ids": [inputs["input_ids"][0, 1:3].tolist()], "num_beams": 2}
    alone = scores_of(model, other)
    for options in ({}, NO_CACHE):
        expected = generate(model, inputs, 3, **asked, **options).sequences
        asks = Asks(lambda: scores_of(model, other))
        out = generate(model, inputs, 3, **asked, **options, logits_processor=[asks])
        assert out.sequences.equal(expected) and asks.found
        for found in asks.found:
            same(found, alone)


def test_another_call_of_generate_and_another_model() -> None:
    inputs, others = picture("llava"), {"llava": longer("llava"), "qwen2_5_vl": picture("qwen2_5_vl", 2)}
    question = some_of(inputs)
    for name, other in others.items():
        inner = pruned(name)
        alone = generate(inner, other, 2, **NO_CACHE)
        asks = Asks(lambda inner=inner, other=other: (generate(inner, other, 2, **NO_CACHE), scores_of(inner, other)))
        expected = generate(pruned("llava"), inputs, 3, question_mask=question, **NO_CACHE)
        forward = scores_of(inner, other)
        out = generate(pruned("llava"), inputs, 3, question_mask=question, logits_processor=[asks], **NO_CACHE)
        same(out.logits, expected.logits)
        for generated, scored in asks.found:
            same(generated.logits, alone.logits)
            same(scored, forward)


def test_the_inputs_of_a_step_may_be_used_twice() -> None:
    """By what is wrapped around the forward, in any order: the question is of these ids, whatever the picture."""
    model, inputs, other = fresh("llava"), picture("llava"), other_picture("llava")
    question = some_of(inputs)
    expected = generate(model, inputs, 3, question_mask=question, **NO_CACHE)
    wanted = scores_of(model, other, question_mask=question)[0]
    forward, found = model.forward, []

    @functools.wraps(forward)
    def contrastive(**kwargs: Any) -> Any:
        features = model.base_model.get_image_features(pixel_values=other["pixel_values"])
        against = forward(**{**kwargs, "mm_encoder_outputs": {"image": features}})
        found.append(hawk_compile.report(against).scores[:, : wanted.shape[1]])
        return forward(**kwargs)

    model.forward = contrastive
    out = generate(model, inputs, 3, question_mask=question, **NO_CACHE)
    same(out.logits, expected.logits)
    assert len(found) == 3
    for scores in found:
        torch.testing.assert_close(scores, wanted, **ROUNDING)


@pytest.mark.parametrize("when", ["before optimize", "after it"])
def test_inputs_that_others_prepare(when: str) -> None:
    """What nobody sees being made is generate's own; its arguments stay known to generate."""
    model = fresh("llava")
    inputs = picture("llava")
    question = some_of(inputs)
    options = {"question_mask": question, **NO_CACHE}
    expected = generate(model, inputs, 3, **options)
    if when == "before optimize":
        hawk_compile.restore(model)
    prepare, seen = type(model).prepare_inputs_for_generation.__get__(model), []

    def others(input_ids: Tensor, note: str | None = None, **kwargs: Any) -> Any:
        seen.append(note)
        return prepare(input_ids, **kwargs)

    model.prepare_inputs_for_generation = others
    if when == "before optimize":
        hawk_compile.optimize(model, ratio=0.6, backend="eager")
    out = generate(model, inputs, 3, note="said", **options)
    same(out.logits, expected.logits)
    assert seen == ["said"] * 3 and hawk_compile.report(out).scores.equal(hawk_compile.report(expected).scores)
    hawk_compile.restore(model)
    assert model.prepare_inputs_for_generation is others


def test_a_loop_of_ones_own_asks_with_the_question_of_its_call() -> None:
    model, inputs = pruned("llava"), picture("llava")
    question = some_of(inputs)
    wanted = scores_of(model, inputs, question_mask=question)[0]

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        images = {name: kwargs[name] for name in ("mm_encoder_outputs", "pixel_values") if kwargs.get(name) is not None}
        found.append(scores_of(model, {"input_ids": input_ids, **images})[0])
        return input_ids

    found: list[Tensor] = []
    model.generate(**inputs, custom_generate=loop, max_new_tokens=2, question_mask=question)
    torch.testing.assert_close(found[0], wanted, **ROUNDING)


def test_a_pruned_assistant_has_the_question_of_its_target() -> None:
    model, twin, inputs = pruned("llava"), drafting(fresh("llava")), picture("llava")
    question = some_of(inputs)
    wanted = scores_of(model, inputs, question_mask=question)[0]
    out = generate(model, inputs, 4, assistant_model=twin, question_mask=question)
    torch.testing.assert_close(hawk_compile.report(out).scores, wanted, **ROUNDING)
    torch.testing.assert_close(hawk_compile.report(twin).scores, wanted, **ROUNDING)
    assert out.sequences.equal(generate(model, inputs, 4, question_mask=question).sequences)
