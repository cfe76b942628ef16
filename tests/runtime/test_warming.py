"""`warm_up`: behind it, prompts of the kinds that it was given compile nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile import HawkError, Progress
from hawk_compile.errors import InputError
from tests import zoo
from tests.marks import slow
from tests.runtime.models import fresh, generate, picture, prompt


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava_onevision", "gemma3", "qwen3_vl")])
def test_nothing_is_compiled_behind_it(name: str) -> None:
    model, told = fresh(name, compile_decode=True), list[Progress]()
    drawn = torch.get_rng_state()
    compiled = hawk_compile.warm_up(model, picture(name, 0), progress=told.append)
    assert compiled == model._hawk_runtime.compilations > 0
    assert [now.done for now in told] == [0, 1, 2, 3] and told[-1].total == 3
    assert torch.get_rng_state().equal(drawn)
    with pytest.raises(HawkError, match="has run no prefill"):
        hawk_compile.report(model)
    (one, other), cold = zoo.sizes(name)[3:5], fresh(name)
    for given in (picture(name, 4), prompt(name, one, one), prompt(name, one, other)):
        assert generate(model, given, 6).sequences.equal(generate(cold, given, 6).sequences)
    assert model._hawk_runtime.compilations == compiled
    assert hawk_compile.warm_up(model, picture(name, 1)) == 0
    assert hawk_compile.report(model).prompt_tokens == prompt(name, one, other)["input_ids"].shape[1]


def test_single_rows_alone() -> None:
    model = fresh("llava")
    assert hawk_compile.warm_up(model, picture("llava", 0), batches=False) == model._hawk_runtime.compilations == 1


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "warm_up was given no prompt: give one of each kind"),
    (["a picture"], "each prompt of warm_up must map names .* got str: give what a processor returns"),
    ([{"pixel_values": torch.zeros(1)}], "input_ids .* among them, got dict"),
    ([{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}], "holds input_ids and nothing to prune: give one with an"),
])  # fmt: skip
def test_prompts_that_are_refused(prompts: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hawk_compile.warm_up(fresh("llava"), *prompts)


def test_a_model_that_is_not_optimised() -> None:
    with pytest.raises(HawkError, match="warm_up needs an optimised model"):
        hawk_compile.warm_up(zoo.build("llava", layers=1), picture("llava"))
