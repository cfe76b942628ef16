"""Code that reads the length of the prompt: sizes follow the pruned length, branches and numbers are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import torch_compilable_check

import hawk_compile
from hawk_compile.errors import CaptureError, ShapeError
from tests import zoo
from tests.runtime.models import LAYERS, RATIO, ROUNDING, picture
from tests.runtime.reference import Conversation
from tests.zoo import Row

NAME = "llava"
Change = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def with_layer(change: Change, layer: int = 1) -> Any:
    """The model with a layer's MLP called through `change`, as users patch them."""
    model = zoo.build(NAME, layers=LAYERS)
    mlp = model.base_model.get_decoder().layers[layer].mlp
    beneath = mlp.forward
    mlp.forward = lambda hidden: change(beneath, hidden)
    return model


def optimized(change: Change, ratio: float = RATIO, layer: int = 1) -> Any:
    return hawk_compile.optimize(with_layer(change, layer), ratio=ratio, backend="eager")


def prefill(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    return logits


def check(model: Any, change: Change, inputs: dict[str, Tensor], ratio: float = RATIO) -> None:
    by_hand = Conversation(with_layer(change), ratio)
    by_hand.prompt(inputs)
    assert len(by_hand.keep) < inputs["input_ids"].shape[1]
    torch.testing.assert_close(prefill(model, inputs), by_hand.logits, **ROUNDING)


def halves_long(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    if hidden.shape[1] < 40:
        return mlp(hidden)
    return mlp(hidden) * 0.5


def doubles_short(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden) * 2 if hidden.shape[1] <= 30 else mlp(hidden)


def divides(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden.sum(1, keepdim=True) / hidden.shape[1] + hidden * (hidden.shape[1] / 30))


def number_of_a_comparison(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden * (1 + int(hidden.shape[1] < 40)))


def as_often_as_it_is_long(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    for _ in range(int(hidden.shape[1] >= 40)):
        hidden = hidden * 0.5
    return mlp(hidden)


def by_a_key(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden) * SCALES.get(f"scale_{hidden.shape[1]}", 1.0)


def by_a_sentence(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    torch_compilable_check(hidden.shape[1] > 2, f"{hidden.shape[1]} tokens are too few")
    return mlp(hidden)


def one_of_two(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp([hidden, hidden * 0.5][hidden.shape[1] >= 40])


def by_logarithm(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden * math.log(hidden.shape[1]))


def by_linspace(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden * torch.linspace(0.5, 1.5, hidden.shape[1])[None, :, None])


def as_long_as_the_prompt(mlp: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return mlp(hidden * TABLE[: hidden.shape[1] * 2 - LONG])


TABLE, LONG = torch.ones(200, 1), 47
SCALES = {"scale_47": 0.5}


def line_of(change: Change, more: int = 1) -> str:
    return f"test_lengths_in_code.py:{change.__code__.co_firstlineno + more}"


def prompt_of(after: int) -> dict[str, Tensor]:
    return zoo.inputs(NAME, zoo.build(NAME, layers=1), rows=[Row(images=zoo.sizes(NAME)[4].images, after=after)])


@pytest.mark.parametrize("change", [halves_long, doubles_short, number_of_a_comparison, as_often_as_it_is_long])
def test_a_branch_that_differs_at_the_pruned_length_is_refused(change: Change) -> None:
    inputs = picture(NAME)
    assert inputs["input_ids"].shape[1] == LONG
    with pytest.raises(ShapeError, match=r"branches on a size of its prompt at .*\(the length, ") as raised:
        prefill(optimized(change), inputs)
    assert line_of(change) in str(raised.value)


def test_one_that_does_not_differ_is_right_and_looked_at_again_where_lengths_change() -> None:
    """Both lengths below 40, both above, then the whole prompt above alone: by ratio, and by the text behind it."""
    model = optimized(halves_long, 0.1)
    inputs = picture(NAME)
    check(model, halves_long, inputs, 0.1)
    kept = hawk_compile.report(model).keep_indices[0].shape[0]
    assert kept >= 40
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    with pytest.raises(ShapeError, match=r"branches on a size of its prompt at .*\(the length, "):
        prefill(model, inputs)
    longer = prompt_of(40)
    check(model, halves_long, longer)
    assert hawk_compile.report(model).keep_indices[0].shape[0] >= 40


def test_a_layer_in_front_of_the_cut_is_held_to_it_too() -> None:
    """The scoring layer's MLP reads pruned tokens as well."""
    with pytest.raises(ShapeError, match=r"branches on a size of its prompt at .*\(the length, "):
        prefill(optimized(halves_long, layer=0), picture(NAME))


@pytest.mark.parametrize("change", [divides, by_a_sentence])
def test_lengths_that_are_computed_with_follow(change: Change) -> None:
    """Those in a message nobody sees."""
    check(optimized(change), change, picture(NAME))


def test_a_line_that_dynamo_cannot_go_on_with_is_named() -> None:
    with pytest.raises(CaptureError, match="cannot be captured as one graph") as raised:
        prefill(optimized(one_of_two), picture(NAME))
    assert line_of(one_of_two) in str(raised.value)


def test_a_branch_on_the_number_of_visual_tokens_behind_the_merge_is_refused() -> None:
    """What later layers add to the visual tokens is as many as are kept."""
    model = zoo.build("qwen3_vl", layers=LAYERS)
    decoder = model.base_model.get_decoder()
    beneath = decoder._deepstack_process

    def process(hidden: Tensor, mask: Tensor, features: Tensor) -> Any:
        return beneath(hidden, mask, features * (1.0 if features.shape[0] < 12 else 5.0))

    decoder._deepstack_process = process
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    with pytest.raises(ShapeError, match=r"branches on a size of its prompt at .*\(the number of visual tokens, "):
        prefill(model, picture("qwen3_vl"))


@pytest.mark.parametrize("change", [by_logarithm, by_linspace, by_a_key])
def test_a_length_that_becomes_a_number_is_refused_with_its_line(change: Change) -> None:
    with pytest.raises(ShapeError, match="makes a number of the length of its prompt") as raised:
        prefill(optimized(change), picture(NAME))
    assert line_of(change) in str(raised.value)


def test_what_cannot_run_at_the_pruned_length_is_said_with_its_module_and_line() -> None:
    with pytest.raises(ShapeError, match="cannot run at the pruned length") as raised:
        prefill(optimized(as_long_as_the_prompt), picture(NAME))
    said = re.search(r"\((model\.[\w.]*), (\S+), in", str(raised.value))
    assert said is not None and "layers.1" in said[1] and said[2].endswith(line_of(as_long_as_the_prompt))
