"""Attention functions that others than transformers have registered: captured as they stand, never replaced.

What is expected is the plain model with the same function, run by hand on the tokens that were kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

import hawk_compile
from hawk_compile.capture.attention import EAGER_FUNCTION, is_of_transformers
from hawk_compile.errors import AttentionNotFoundError
from tests import zoo
from tests.marks import slow
from tests.runtime.models import LAYERS, RATIO, ROUNDING, picture
from tests.runtime.reference import Conversation

OWN = "attention-of-a-test"
NAMES = ["llava", *slow("qwen2_5_vl", "gemma3")]


def half(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value * 0.5, mask, **kwargs)


def in_steps(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """No scaled_dot_product_attention in it: softmax of scores to the power of 3."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * kwargs["scaling"]
    seen = torch.ones_like(scores, dtype=torch.bool).tril() if mask is None else mask
    weights = (scores**3).masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


@torch.library.custom_op("hawk_tests::opaque_attention", mutates_args=())
def opaque_operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.clone()


@opaque_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


def opaque(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    return opaque_operator(query, key, value).transpose(1, 2).contiguous(), None


def mask_of_first(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask of other rules than the causal one: every token sees the first four, and nothing else but itself."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    first = torch.arange(mask.shape[-1]) < 4
    return mask & (first | torch.eye(*mask.shape[-2:], dtype=torch.bool))


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone behind it."""
    for table in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(table, "_global_mapping", dict(table._global_mapping))
    yield


def register(name: str, function: Any, masks: Any = sdpa_mask) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, masks)


def built(name: str, attention: str | dict[str, str]) -> Any:
    model = zoo.build(name, layers=LAYERS)
    model.set_attn_implementation(attention)
    return model


def expected_of(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[int]]:
    by_hand = Conversation(model, RATIO)
    by_hand.prompt(inputs)
    return by_hand.logits, by_hand.keep.tolist()


def holds(model: Any, plain_model: Any, name: str = "llava") -> hawk_compile.Report:
    inputs = picture(name)
    with torch.no_grad():
        output = model(**inputs)
    report = hawk_compile.report(output)
    logits, keep = expected_of(plain_model, inputs)
    assert report.keep_indices[0].tolist() == keep and len(keep) < inputs["input_ids"].shape[1]
    torch.testing.assert_close(output.logits[0], logits, **ROUNDING)
    return report


@pytest.mark.parametrize("function", [half, in_steps])
@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_one_s_own_is_captured(name: str, function: Any) -> None:
    register(OWN, function)
    model = hawk_compile.optimize(built(name, {"text_config": OWN}), ratio=RATIO, backend="eager")
    report = holds(model, built(name, {"text_config": OWN}), name)
    assert (report.prefill_attention, report.attention) == (OWN, OWN)


def test_one_that_is_set_later_is_captured_then() -> None:
    """Behind an attention in whose place SDPA was captured, and such a one behind it."""
    register(OWN, half)
    model = hawk_compile.optimize(built("llava", "eager"), ratio=RATIO, backend="eager")
    for attention in ("eager", OWN, "sdpa"):
        model.set_attn_implementation({"text_config": attention})
        report = holds(model, built("llava", {"text_config": attention}))
        assert report.prefill_attention == (OWN if attention == OWN else "sdpa")


def test_another_function_by_the_same_name_is_captured_anew() -> None:
    register(OWN, half)
    model = hawk_compile.optimize(built("llava", {"text_config": OWN}), ratio=RATIO, backend="eager")
    holds(model, built("llava", {"text_config": OWN}))
    register(OWN, in_steps)
    holds(model, built("llava", {"text_config": OWN}))


def test_one_that_stands_in_the_place_of_sdpa() -> None:
    """By its name it is captured; a model that uses eager attention is captured with that, and not with it."""
    plain_eager = built("llava", "eager")
    inputs = picture("llava")
    expected = expected_of(plain_eager, inputs)[0]
    AttentionInterface.register("sdpa", half)
    eager = hawk_compile.optimize(built("llava", "eager"), ratio=RATIO, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(eager(**inputs).logits[0], expected, **ROUNDING)
    assert hawk_compile.report(eager).prefill_attention == "eager"
    holds(hawk_compile.optimize(built("llava", "sdpa"), ratio=RATIO, backend="eager"), built("llava", "sdpa"))


def test_an_eager_attention_that_was_replaced_in_the_model_s_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first prompt and behind one, and put back: no registry knows it."""
    model = hawk_compile.optimize(built("llava", "eager"), ratio=RATIO, backend="eager")
    file, shipped = modeling_llama, modeling_llama.eager_attention_forward
    assert holds(model, built("llava", "eager")).prefill_attention == "sdpa"
    monkeypatch.setattr(file, EAGER_FUNCTION, lambda *args, **kwargs: half(*args, **kwargs))
    assert holds(model, built("llava", "eager")).prefill_attention == "eager"
    other = hawk_compile.optimize(built("llava", "eager"), ratio=RATIO, backend="eager")
    assert holds(other, built("llava", "eager")).prefill_attention == "eager"
    monkeypatch.setattr(file, EAGER_FUNCTION, shipped)
    assert holds(model, built("llava", "eager")).prefill_attention == "sdpa"


def test_masks_of_one_s_own_are_captured() -> None:
    """Under a name of one's own, and under one of transformers' whose function is its own."""
    register(OWN, sdpa_attention_forward, mask_of_first)
    model = hawk_compile.optimize(built("llava", {"text_config": OWN}), ratio=RATIO, backend="eager")
    holds(model, built("llava", {"text_config": OWN}))
    assert not is_of_transformers(OWN)


def test_one_that_no_graph_shows_is_refused() -> None:
    register(OWN, opaque)
    model = hawk_compile.optimize(built("llava", {"text_config": OWN}), ratio=RATIO, backend="eager")
    with torch.no_grad(), pytest.raises(AttentionNotFoundError, match=r"attn_implementation=.sdpa"):
        model(**picture("llava"))


def test_which_functions_are_transformers_own() -> None:
    shipped = ("eager", "sdpa", "flash_attention_2", "flash_attention_4", "flex_attention", "paged|eager")
    assert all(map(is_of_transformers, (*shipped, None, "kernels-community/flash-attn2")))
    AttentionMaskInterface.register("flex_attention", mask_of_first)
    AttentionInterface.register("flash_attention_2", torch.no_grad()(half))
    AttentionInterface.register("eager", functools.wraps(sdpa_attention_forward)(lambda *args: half(*args)))
    assert not any(map(is_of_transformers, ("flex_attention", "flash_attention_2", "eager")))
