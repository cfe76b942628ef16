"""Forwards that users put above a model's own: what they hand on is taken, what they leave out is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration as Llava

import hawk_compile
from hawk_compile.capture.signatures import signature_of
from hawk_compile.errors import MergeNotFoundError, UnsupportedModelError
from tests import zoo
from tests.runtime.models import LAYERS, RATIO, ROUNDING, conversation, generate, new_tokens, picture

NAME = "llava"


class SomeNamed(Llava):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        output.logits = output.logits * 2
        return output


class Wrapping(Llava):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = Llava.forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output


class AboveAnother(SomeNamed):
    def forward(self, input_ids: Any, *more: Any, **kwargs: Any) -> Any:
        return super().forward(input_ids, *more, **kwargs)


class Swallowing(Llava):
    """It takes anything, and hands on what it names."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        return super().forward(input_ids, pixel_values, attention_mask)


class WithoutRest(Llava):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None) -> Any:
        return super().forward(input_ids, pixel_values, attention_mask)


def model_of(kind: Any) -> Any:
    model = zoo.build(NAME, layers=LAYERS)
    model.__class__ = kind
    return model


def optimized(model: Any) -> Any:
    return hawk_compile.optimize(model, ratio=RATIO, backend="eager")


@pytest.mark.parametrize("kind", [SomeNamed, Wrapping, AboveAnother])
def test_what_a_forward_hands_on_it_takes(kind: Any) -> None:
    """By name and by place; what it does to the output is done to that of the pruned prompt."""
    model, inputs = optimized(model_of(kind)), picture(NAME)
    by_hand = conversation(NAME, inputs)
    with torch.no_grad():
        output = model(inputs["input_ids"], **{name: value for name, value in inputs.items() if name != "input_ids"})
    torch.testing.assert_close(output.logits[0], 2 * by_hand.logits, **ROUNDING)
    assert hawk_compile.report(output).keep_indices[0].tolist() == by_hand.keep.tolist()


def test_generate_of_one_that_names_images() -> None:
    model, inputs = optimized(model_of(SomeNamed)), picture(NAME)
    out = generate(model, inputs, 4)
    assert new_tokens(out, inputs) == conversation(NAME, inputs).greedy(4)
    assert hawk_compile.report(out).kept_visual_tokens < hawk_compile.report(out).visual_tokens


def test_a_forward_put_on_the_model_itself() -> None:
    """Without `functools.wraps`; behind restore it is there as before."""
    model, inputs = zoo.build(NAME, layers=LAYERS), picture(NAME)
    beneath = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = beneath(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = forward  # type: ignore[method-assign]
    with torch.no_grad():
        output = optimized(model)(**inputs)
    torch.testing.assert_close(output.logits[0], 2 * conversation(NAME, inputs).logits, **ROUNDING)
    assert hawk_compile.restore(model).forward is forward


def test_one_that_hands_on_less_is_refused_at_the_first_prompt() -> None:
    with torch.no_grad(), pytest.raises(MergeNotFoundError, match="no merge of visual features"):
        optimized(model_of(Swallowing))(**picture(NAME))


def test_one_that_takes_less_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"forward of WithoutRest does not take encoded.*functools\.wraps"):
        optimized(model_of(WithoutRest))
    model = zoo.build(NAME, layers=LAYERS)
    beneath = model.forward
    model.forward = lambda input_ids, pixel_values: beneath(input_ids, pixel_values)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="hand these on"):
        optimized(model)


def test_arguments_stand_where_they_are_taken() -> None:
    own = list(inspect.signature(Llava.forward).parameters)
    assert list(signature_of(Wrapping).parameters) == [*own[:-1], "kwargs"]
    assert list(signature_of(AboveAnother).parameters)[:4] == ["self", "input_ids", "pixel_values", "attention_mask"]
    assert list(signature_of(SomeNamed).parameters)[:3] == ["self", "input_ids", "pixel_values"]
    assert signature_of(SomeNamed).parameters["attention_mask"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature_of(WithoutRest) == inspect.signature(WithoutRest.forward)
    assert signature_of(Llava) == inspect.signature(Llava.forward)
