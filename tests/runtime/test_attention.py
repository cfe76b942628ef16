"""Models loaded with another attention than SDPA: the prefill is captured with SDPA, everything else keeps the model's.

`KERNEL` stands for an attention that no graph can show, as FlashAttention's or one of the Hub's: a name in
transformers' table, with masks [B, L] as FlashAttention takes them. Functions that others have registered are tested in
tests/runtime/test_own_attention.py.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hawk_compile
from hawk_compile.passes.graph import is_call
from hawk_compile.runtime import compiled
from tests import zoo
from tests.marks import slow
from tests.runtime.models import LAYERS, RATIO, fresh, generate, new_tokens, picture, plain, prompt

KERNEL = "kernels-of/a-test"
EAGER = "eager"
NAMES = ["llava", *slow("gemma3", "qwen2_5_vl")]
"""Plain; sliding windows and attention both ways; mRoPE."""

calls: list[tuple[int, ...]] = []
"""The queries' shapes [B, H, S, d] of each call of `KERNEL`."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention behind a cache, by a mask of keys [B, L]."""
    calls.append(tuple(query.shape))
    new, total = query.shape[2], key.shape[2]
    seen = torch.ones((new, total), dtype=torch.bool, device=query.device).tril(total - new)
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        seen = seen & attention_mask[:, None, None, -total:].bool()
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=kwargs.get("scaling"), enable_gqa=True)  # fmt: skip
    return mixed.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, KERNEL, attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, KERNEL, flash_attention_mask)
    calls.clear()
    yield


def loaded(name: str, attention: str, ratio: float = RATIO, **settings: Any) -> Any:
    """An optimised model whose decoder attends by another implementation; its encoder by SDPA, so that features are
    the same."""
    model = zoo.build(name, layers=LAYERS)
    use(model.config.get_text_config(), attention)
    return hawk_compile.optimize(model, ratio=ratio, backend="eager", **settings)


def use(config: Any, attention: str) -> None:
    """As set_attn_implementation, which would load a kernel from the Hub."""
    config._attn_implementation = attention
    assert config.get_text_config()._attn_implementation == attention


def prefill(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("attention", [EAGER, pytest.param(KERNEL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_the_prefill_is_that_of_the_model_loaded_with_sdpa(name: str, attention: str) -> None:
    """Bit for bit, with nothing removed and with most of it, one row and a padded batch."""
    model = loaded(name, attention)
    some = zoo.sizes(name)
    batch = prompt(name, some[0], some[3])
    for ratio in (0.0, RATIO):
        hawk_compile.optimize(model, ratio=ratio, backend="eager")
        for inputs in (picture(name), batch):
            expected = prefill(fresh(name, ratio), inputs)
            assert torch.equal(prefill(model, inputs), expected)
    assert calls == []
    with torch.no_grad():
        assert torch.equal(prefill(loaded(name, attention, 0.0), picture(name)), plain(name)(**picture(name)).logits)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_keeps_the_model_s_own(name: str) -> None:
    """generate, one row and a padded batch: as many calls of it as there are steps and layers, each of one token."""
    model = loaded(name, KERNEL)
    some = zoo.sizes(name)
    for inputs in (picture(name), prompt(name, some[0], some[3])):
        rows = len(inputs["input_ids"])
        calls.clear()
        out, expected = generate(model, inputs), generate(fresh(name), inputs)
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-5)
        assert len(calls) == LAYERS * 7 and {(shape[0], shape[2]) for shape in calls} == {(rows, 1)}
        report = hawk_compile.report(out)
        assert (report.prefill_attention, report.attention) == ("sdpa", KERNEL)
        assert report.kept_visual_tokens.sum() < report.visual_tokens.sum()


@pytest.mark.slow
def test_later_turns_and_prompts_without_images_keep_it_too() -> None:
    model = loaded("llava", KERNEL)
    inputs = picture("llava")
    first = generate(model, inputs, tokens=3)
    calls.clear()
    ids = torch.cat([first.sequences, torch.full((1, 4), 77)], 1)
    second = generate(model, {"input_ids": ids}, tokens=2, past_key_values=first.past_key_values)
    assert calls[0][2] == 5 and len(calls) == LAYERS * 2
    sdpa = fresh("llava")
    before = generate(sdpa, inputs, tokens=3)
    expected = generate(sdpa, {"input_ids": ids}, tokens=2, past_key_values=before.past_key_values)
    assert new_tokens(second, {"input_ids": ids}) == new_tokens(expected, {"input_ids": ids})
    text = {"input_ids": ids.masked_fill(ids == model.config.image_token_id, 77)}
    calls.clear()
    prefill(model, text)
    report = hawk_compile.report(model)
    assert len(calls) == LAYERS and (report.prefill_attention, report.attention) == (KERNEL, KERNEL)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [EAGER, KERNEL])
def test_static_caches(attention: str) -> None:
    options = {"cache_implementation": "static", "tokens": 4}
    out = generate(loaded("llava", attention), picture("llava"), **options)
    expected = generate(fresh("llava"), picture("llava"), **options)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.slow
def test_compiled_decode_steps_keep_it() -> None:
    model = loaded("llava", EAGER, compile_decode=True)
    graphs: list[torch.fx.GraphModule] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "inner_compiler", lambda name: lambda gm, _: graphs.append(gm) or gm.forward)
        out = generate(model, picture("llava"), tokens=4)
    assert torch.equal(out.sequences, generate(fresh("llava"), picture("llava"), tokens=4).sequences)
    (step,) = graphs
    kinds = [sum(is_call(node, name) for node in step.graph.nodes) for name in ("softmax",
                                                                               "scaled_dot_product_attention")]
    assert kinds == [LAYERS, 0]


def test_encoders_keep_the_model_s_own() -> None:
    model = zoo.build("llava", layers=LAYERS)
    use(model.config, KERNEL)
    seen = []
    tower = model.base_model.vision_tower
    tower.register_forward_hook(lambda *_: seen.append(tower.config._attn_implementation))
    prefill(hawk_compile.optimize(model, ratio=RATIO, backend="eager"), picture("llava"))
    assert seen == [KERNEL] and calls and not any(shape[2] == 1 for shape in calls)


def test_an_implementation_set_later_is_followed() -> None:
    model = fresh("llava")
    inputs = picture("llava")
    expected = prefill(model, inputs)
    use(model.config.get_text_config(), KERNEL)
    assert torch.equal(prefill(model, inputs), expected)
    assert hawk_compile.report(model).attention == KERNEL
    model.set_attn_implementation({"text_config": "sdpa"})
    assert torch.equal(prefill(model, inputs), expected)
    assert hawk_compile.report(model).attention == "sdpa"


def test_a_thread_that_decodes_is_not_told_of_one_that_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step in the middle of another thread's capture; the configuration there says what the user chose."""
    model = loaded("llava", KERNEL)
    out = generate(model, picture("llava"), tokens=2)
    config = model.config.get_text_config()
    real, answers = compiled.compile_graph, []

    def decode() -> None:
        answers.append(config._attn_implementation)
        calls.clear()
        with torch.no_grad():
            model(input_ids=out.sequences[:, -1:], past_key_values=out.past_key_values)
        answers.append(len(calls))

    def compile_graph(*args: Any) -> Any:
        answers.append(config._attn_implementation)
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join(60)
        return real(*args)

    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    some = zoo.sizes("llava")
    prefill(model, prompt("llava", some[0], some[1]))
    assert answers == ["sdpa", KERNEL, LAYERS]


@pytest.mark.slow
def test_what_configurations_answer_is_put_back() -> None:
    """As soon as no model needs it; models that use SDPA everywhere never change it."""
    gc.collect()  # models of other tests
    answer = vars(PretrainedConfig)["_attn_implementation"]
    prefill(fresh("llava"), picture("llava"))
    assert vars(PretrainedConfig)["_attn_implementation"] is answer
    model = loaded("llava", EAGER)
    prefill(model, picture("llava"))
    assert vars(PretrainedConfig)["_attn_implementation"] is not answer
    hawk_compile.restore(model)
    assert vars(PretrainedConfig)["_attn_implementation"] is answer


@pytest.mark.slow
def test_flex_attention() -> None:
    model = loaded("llava", "flex_attention")
    out, expected = generate(model, picture("llava"), tokens=4), generate(fresh("llava"), picture("llava"), tokens=4)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.logits[0], expected.logits[0])
