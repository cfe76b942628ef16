"""PEFT: adapters that are put on, switched, merged and taken off after `optimize` are what runs; virtual tokens too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile.errors import CaptureError, UnsupportedCallError
from tests import zoo
from tests.runtime.models import ROUNDING, fresh, generate, new_tokens, picture, prompt, rows_alone
from tests.runtime.reference import Conversation, decoder_inputs
from tests.runtime.test_wrappers import NAME, RATIO, check, log_probabilities, settings

TARGETS = r".*language_model.*(q_proj|k_proj|up_proj)"
VIRTUAL = 5


def adapter(kind: Any = peft.LoraConfig, **options: Any) -> Any:
    if kind is peft.LoraConfig:
        options = {"r": 4, "init_lora_weights": False} | options
    return kind(target_modules=TARGETS, **options)


def put(model: Any, config: Any, name: str, seed: int) -> Any:
    """The adapter of a seed, which weighs on every model alike."""
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    return model.eval()


def same(model: Any, other: Any, inputs: dict[str, Tensor] | None = None) -> None:
    """A model prunes as another, which is not optimised and has the same adapters, does by hand."""
    inputs = picture(NAME) if inputs is None else inputs
    by_hand = Conversation(other, RATIO).prompt(inputs).log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, inputs), by_hand, **ROUNDING)


def test_adapters_that_come_and_go() -> None:
    wrapped, other = (put(each, adapter(), "a", 0) for each in (fresh(NAME), zoo.build(NAME, layers=2)))
    same(wrapped, other.get_base_model())
    assert hawk_compile.report(wrapped).reason.startswith("ratio=0.6 removes")
    with wrapped.disable_adapter():
        check(wrapped)


@pytest.mark.slow
def test_another_adapter_and_the_weights_of_both_in_one(tmp_path: Path) -> None:
    model = fresh(NAME)
    check(model)
    wrapped, other = (put(each, adapter(), "a", 0) for each in (model, zoo.build(NAME, layers=2)))
    base = other.get_base_model()
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh(NAME), tmp_path / "a").eval()
    same(loaded, base)
    for each in (wrapped, other):
        put(each, adapter(r=8), "b", 1)
        each.set_adapter("b")
    same(wrapped, base)
    wrapped.merge_adapter()
    same(wrapped, base)
    wrapped.unmerge_adapter()
    same(wrapped, base)
    merged = wrapped.merge_and_unload()
    assert merged is model
    same(merged, base)


def test_rows_with_adapters_of_their_own_are_refused() -> None:
    model = put(put(fresh(NAME), adapter(), "a", 0), adapter(), "b", 1)
    inputs = prompt(NAME, zoo.sizes(NAME)[4], zoo.sizes(NAME)[4])
    for call in (model, model.generate):
        with pytest.raises(UnsupportedCallError, match="adapter_names gives rows or tokens of a call adapters"):
            call(**inputs, adapter_names=["a", "b"])


def test_adapters_of_some_tokens_alone_are_refused() -> None:
    """aLoRA: from where its words stand on."""
    model, inputs = fresh(NAME), picture(NAME)
    words = inputs["input_ids"][0, -3:-1].tolist()
    of_text = r".*language_model.*\.q_proj"
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=of_text, task_type="CAUSAL_LM", alora_invocation_tokens=words)
    ).eval()
    for call in (wrapped, wrapped.generate):
        with pytest.raises(UnsupportedCallError, match="alora_offsets gives rows or tokens of a call adapters"):
            call(**inputs)


@pytest.mark.slow
def test_several_adapters_and_those_of_transformers() -> None:
    """set_adapter of one and of several, disable_adapters, delete_adapter: of transformers' own integration."""
    model, other = fresh(NAME), zoo.build(NAME, layers=2)
    check(model)
    for each in (model, other):
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            each.add_adapter(adapter(), name)
        each.eval()
    for change in (
        lambda each: each.set_adapter("a"), lambda each: each.set_adapter("b"),
        lambda each: each.set_adapter(["a", "b"]), lambda each: each.disable_adapters(),
        lambda each: each.enable_adapters(), lambda each: each.delete_adapter("a"),
    ):  # fmt: skip
        change(model)
        change(other)
        same(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "OFTConfig"])
@pytest.mark.parametrize("first", ["optimize", "adapter"])
def test_every_kind(kind: str, first: str) -> None:
    if kind == "IA3Config":
        config = adapter(peft.IA3Config, feedforward_modules=".*up_proj", init_ia3_weights=False)
    elif kind == "OFTConfig":
        config = adapter(peft.OFTConfig, init_weights=False, oft_block_size=0, r=4)
    else:
        config = adapter(getattr(peft, kind), **({} if kind == "LoraConfig" else {"init_weights": False}))
    other = put(zoo.build(NAME, layers=2), config, "a", 0)
    if first == "optimize":
        model = put(fresh(NAME), config, "a", 0)
    else:
        model = hawk_compile.optimize(put(zoo.build(NAME, layers=2), config, "a", 0), **settings())
    same(model, other.get_base_model())
    out = generate(model, picture(NAME), 4)
    by_hand = Conversation(other.get_base_model(), RATIO)
    by_hand.prompt(picture(NAME))
    assert new_tokens(out, picture(NAME)) == by_hand.greedy(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"target_modules": "all-linear"}, {"compile_vision": True}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
        ({"target_modules": ["k_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6]}, {}),
    ],
)  # fmt: skip
def test_adapters_everywhere(name: str, options: dict[str, Any], more: dict[str, Any]) -> None:
    """Of encoders, embeddings and heads, in a padded batch of two sizes: each row as it is alone, by hand."""
    sizes = [zoo.sizes(name)[2], zoo.sizes(name)[4]]
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    model, other = (put(zoo.build(name, layers=2), config, "a", 0) for _ in range(2))
    hawk_compile.optimize(model, **settings(), **more)
    inputs = prompt(name, *sizes)
    out = generate(model, inputs, 2)
    for row, alone in enumerate(rows_alone(name, inputs, sizes)):
        by_hand = Conversation(other.get_base_model(), RATIO).prompt(alone)[-1].log_softmax(-1)
        torch.testing.assert_close(out.logits[0][row].log_softmax(-1), by_hand, **ROUNDING)


@pytest.mark.slow
def test_an_adapter_that_norms_weights() -> None:
    """DoRA looks at the class of these weights in a way that Dynamo does not follow by itself."""
    config = adapter(use_dora=True)
    model, other = (put(each, config, "a", 0) for each in (fresh(NAME), zoo.build(NAME, layers=2)))
    same(model, other.get_base_model())


@pytest.mark.slow
def test_one_that_norms_quantised_weights_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    model = fresh(NAME)
    quantization.quantize_(model.base_model.get_decoder(), quantization.Int8WeightOnlyConfig())
    model = put(model, adapter(use_dora=True), "a", 0)
    with pytest.raises(CaptureError, match="cannot be captured as one graph"):
        model(**picture(NAME))


@pytest.mark.slow
def test_a_compiled_step_runs_the_adapter_of_the_call() -> None:
    model, other = fresh(NAME, compile_decode=True, ratio=RATIO), zoo.build(NAME, layers=2)
    wrapped, twin = (put(put(each, adapter(), "a", 0), adapter(), "b", 1) for each in (model, other))
    for name in "abab":
        wrapped.set_adapter(name)
        twin.set_adapter(name)
        by_hand = Conversation(twin.get_base_model(), RATIO)
        by_hand.prompt(picture(NAME))
        assert new_tokens(generate(wrapped, picture(NAME), 4), picture(NAME)) == by_hand.greedy(4), name


@pytest.mark.slow
@pytest.mark.parametrize("optimised", ["wrapper", "model"])
def test_virtual_tokens_in_front_of_the_prompt(optimised: str) -> None:
    """Prompt tuning: they are text that nobody wrote, which is kept and has no vote."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    for name in (NAME, "qwen2_5_vl"):
        inputs, other = picture(name), put(zoo.build(name, layers=2), config, "a", 0)
        model = put(zoo.build(name, layers=2), config, "a", 0)
        hawk_compile.optimize(model if optimised == "wrapper" else model.base_model, **settings())
        by_hand = Conversation(other.base_model, RATIO)
        ids = [-1] * VIRTUAL + inputs["input_ids"][0].tolist()
        by_hand.prefill(decoder_inputs(other, inputs), ids, inputs)
        out = generate(model, inputs, 5)
        torch.testing.assert_close(out.logits[0][0].log_softmax(-1), by_hand.logits[-1].log_softmax(-1), **ROUNDING)
        assert new_tokens(out, inputs) == by_hand.greedy(5)
        assert hawk_compile.report(model).prompt_tokens == len(ids)


@pytest.mark.slow
def test_keys_and_values_in_front_of_the_prompt() -> None:
    """Prefix tuning: the prompt stands behind a cache that holds them."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model, other = (put(zoo.build(NAME, layers=2), config, "a", 0) for _ in range(2))
    hawk_compile.optimize(model, **settings())
    inputs = picture(NAME)
    with torch.no_grad():
        by_hand = Conversation(other.base_model, RATIO, other.get_prompt(1, max_cache_len=100))
    by_hand.seen = by_hand.next_position = VIRTUAL
    by_hand.prompt(inputs)
    torch.testing.assert_close(log_probabilities(model, inputs), by_hand.logits.log_softmax(-1), **ROUNDING)
    out = generate(model, inputs, 5)
    torch.testing.assert_close(out.logits[0][0].log_softmax(-1), by_hand.logits[-1].log_softmax(-1), **ROUNDING)
    assert new_tokens(out, inputs) == by_hand.greedy(5)
    with model.disable_adapter():
        check(model)
