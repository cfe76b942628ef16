"""A prefill captured once: passes run on copies of its graph, at any size, without another capture."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import hawk_compile
from hawk_compile.capture.prefill import CapturedPrefill, capture_prefill
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import run_passes
from hawk_compile.errors import InputError
from hawk_compile.settings.config import HawkConfig
from tests import zoo
from tests.capture.calls import call_of
from tests.runtime.models import plain

NAMES = ("llava", "qwen3_vl")
"""Plain; mRoPE and features for later layers."""


@cache
def captured(name: str) -> CapturedPrefill:
    model = plain(name)
    return capture_prefill(model, *call_of(model, inputs(name, 4)))


def inputs(name: str, which: int) -> dict[str, Any]:
    return zoo.inputs(name, plain(name), rows=[zoo.sizes(name)[which]])


def rewritten(name: str, **settings: Any) -> Any:
    prefill = captured(name)
    return run_passes(prefill.copy(), prefill.example_inputs, options_of(HawkConfig(backend="eager", **settings)))


@pytest.mark.parametrize("name", NAMES)
def test_passes_on_a_copy_are_passes_on_the_original(name: str) -> None:
    prefill = captured(name)
    before = prefill.gm.code
    first = rewritten(name).code
    other = rewritten(name, selector="idpruner", normalization="softmax").code
    assert other != first and rewritten(name).code == first
    assert prefill.gm.code == before != first
    own = capture_prefill(plain(name), *call_of(plain(name), inputs(name, 4)))
    assert run_passes(own.gm, own.example_inputs, options_of(HawkConfig(backend="eager"))).code == first


def test_a_graph_that_was_taken_outlives_what_took_it() -> None:
    """The symbols of its sizes too, which go with graphs that are compiled."""
    model = plain("llava")
    prefill = capture_prefill(model, *call_of(model, inputs("llava", 4)))
    gc.collect()
    assert len(prefill.arguments(*call_of(model, inputs("llava", 0)))) == len(prefill.example_inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("which", "ratio"), [(4, 0.5), (0, 0.8), (5, 0.3)])
def test_a_copy_gives_what_the_optimised_model_gives(name: str, which: int, ratio: float) -> None:
    """At the size that was captured and at others, without another capture."""
    prefill, gm = captured(name), rewritten(name)
    model, given = plain(name), inputs(name, which)
    frames = counters["frames"]["total"]
    call = call_of(model, given, ratio=ratio)
    with torch.no_grad():
        results = prefill.run(gm, *call)
    assert counters["frames"]["total"] == frames
    hawk_compile.optimize(model, ratio=ratio, backend="eager")
    try:
        expected = model(**given).logits
        assert torch.equal(results["keep"][0], hawk_compile.report(model).keep_indices[0])
    finally:
        hawk_compile.restore(model)
    assert torch.equal(results["logits"], expected)


def test_a_call_of_another_structure_is_refused() -> None:
    row, longer = zoo.sizes("llava")[4], zoo.sizes("llava")[5]
    for rows, difference in (([row, row], r"\[2, \d+\], captured was \[1, s"), ([row, longer], "tensors and settings")):
        batch = zoo.inputs("llava", plain("llava"), rows=rows)
        with pytest.raises(InputError, match=difference):
            captured("llava").arguments(*call_of(plain("llava"), batch))


def test_a_size_that_was_found_to_be_a_number_is_asked_for() -> None:
    """Positions with a row for text in front, [4, 1, S], where those of the call that was captured had none."""
    name = "qwen3_vl"
    given, past_mask, planned = call_of(plain(name), inputs(name, 4))
    assert given["position_ids"].shape[0] == 3
    longer = {**given, "position_ids": torch.cat([given["position_ids"][:1], given["position_ids"]])}
    prefill = captured(name)
    prefill.arguments(given, past_mask, planned)
    with pytest.raises(InputError, match="captured for calls of another structure"):
        prefill.arguments(longer, past_mask, planned)


def test_the_model_is_left_as_it_was() -> None:
    model = zoo.build("llava", layers=1)
    model.base_model.__dict__["get_placeholder_mask"] = own = model.base_model.get_placeholder_mask
    held = set(model.base_model.__dict__)
    capture_prefill(model, *call_of(model, inputs("llava", 4)))
    assert set(model.base_model.__dict__) == held and model.base_model.__dict__["get_placeholder_mask"] is own
