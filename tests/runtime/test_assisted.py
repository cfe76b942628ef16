"""Assisted decoding on an optimised model: the prompt is prefilled alone, and drafts change no token and no logit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import candidate_generator

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.drafting import begin_behind_prompt
from hawk_compile.runtime.forward import behind_cache
from tests import zoo
from tests.marks import slow
from tests.runtime.models import (
    ROUNDING,
    conversation,
    fresh,
    generate,
    new_tokens,
    picture,
    plain,
    prompt,
    pruned,
)
from tests.runtime.test_turns import QUESTION, check_logits, follow_up, turn
from tests.zoo import Row, common

LOOKUP = {"prompt_lookup_num_tokens": 3}
OTHERS = [name for name in zoo.NAMES if name != "qwen2_5_vl"]
LLAVA_TOO = ("qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow))


def drafting(model: PreTrainedModel) -> PreTrainedModel:
    """A model that drafts several tokens, however little it is sure of them."""
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = 4
    return model


def small(name: str) -> PreTrainedModel:
    """A model of the same kind that drafts, with one layer less."""
    return drafting(zoo.build(name, layers=1))


def text_model(vocabulary: int = common.VOCAB) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return drafting(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).eval())


class Calls:
    """What a model's forward is given: how many tokens, and whether with images."""

    def __init__(self, model: PreTrainedModel):
        self.lengths: list[int] = []
        self.images: list[bool] = []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])
        self.images.append(kwargs.get("pixel_values") is not None or bool(kwargs.get("mm_encoder_outputs")))

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()


def check(name: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Greedy: the hand-written loop's logits, its tokens, and the tokens that were kept without an assistant."""
    expected = generate(pruned(name), inputs, 10)
    kept = hawk_compile.report(expected).keep_indices[0]
    out = generate(pruned(name), inputs, 10, **options)
    assert out.sequences.equal(expected.sequences)
    assert hawk_compile.report(out).keep_indices[0].equal(kept) and len(kept) < inputs["input_ids"].shape[1]
    check_logits(out, conversation(name, inputs), inputs)
    return out


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow(*OTHERS)])
def test_prompt_lookup(name: str) -> None:
    check(name, picture(name), **LOOKUP)


@pytest.mark.parametrize("name", [*LLAVA_TOO, pytest.param("gemma3", marks=pytest.mark.slow)])
def test_an_assistant_of_the_same_kind_is_shown_the_images_once(name: str) -> None:
    assistant, inputs = small(name), picture(name)
    with Calls(assistant) as calls:
        check(name, inputs, assistant_model=assistant)
    assert calls.lengths[0] == inputs["input_ids"].shape[1] and calls.images[0]
    assert len(calls.lengths) > 3 and max(calls.lengths[1:]) <= 2 and not any(calls.images[1:])


@pytest.mark.parametrize("name", LLAVA_TOO)
def test_an_assistant_of_another_kind_reads_the_prompt_as_text(name: str) -> None:
    for assistant in (text_model(), small("llava" if name != "llava" else "qwen2_5_vl")):
        with Calls(assistant) as calls:
            check(name, picture(name), assistant_model=assistant)
        assert calls.lengths[0] == picture(name)["input_ids"].shape[1] and not any(calls.images)


def tokenizer(words: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    """One id for each word, in order."""
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = WhitespaceSplit()
    named = {"unk_token": words[0], "additional_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=words[1], pad_token=words[2], **named)


@pytest.mark.parametrize("sample", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_assistant_with_another_tokenizer(sample: bool) -> None:
    """It reads and drafts text that is translated, without what stands for images."""
    words = [f"word{number}" for number in range(common.VOCAB)]
    fewer = [*words[:3], *words[: common.FIRST_TEXT - 1 : -1], "unknown"]  # transformers needs one not shared
    assistant, inputs = text_model(len(fewer)), picture("llava")
    tokenizers = {
        "tokenizer": tokenizer(words, words[: common.FIRST_TEXT]), "assistant_tokenizer": tokenizer(fewer, fewer[:3])
    }  # fmt: skip
    torch.manual_seed(0)
    with Calls(assistant) as calls:
        out = generate(pruned("llava"), inputs, 10, assistant_model=assistant, do_sample=sample, **tokenizers)
    check_logits(out, conversation("llava", inputs), inputs)
    assert len(calls.lengths) > 3 and len(new_tokens(out, inputs)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_pruned_model_drafts(name: str) -> None:
    """For a pruned target, which takes all that its twin drafts; and for one that is not pruned, whose tokens it is."""
    inputs, twin = picture(name), drafting(fresh(name))
    kept = len(conversation(name, inputs).keep)
    with Calls(pruned(name)) as calls:
        out = generate(pruned(name), inputs, 10, assistant_model=twin)
    check_logits(out, conversation(name, inputs), inputs)
    assert max(calls.lengths[1:]) > 2 and len(calls.lengths) < 5  # the prompt, and then several tokens at once
    assert hawk_compile.report(twin).kept_tokens == kept
    expected = generate(plain(name), inputs, 10)
    for options in ({}, {"output_hidden_states": True}):
        found = generate(plain(name), inputs, 10, assistant_model=twin, **options)
        assert found.sequences.equal(expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **ROUNDING)
    assert hawk_compile.report(twin).kept_tokens == kept


def test_what_a_draft_says_has_no_vote() -> None:
    """A prompt without an end of turn, behind which drafted text would be taken for more of the question."""
    row = Row(images=zoo.sizes("llava")[4].images, tail=None)
    check("llava", prompt("llava", row), **LOOKUP)


@pytest.mark.slow
def test_sampling() -> None:
    """Tokens are drawn from the hand-written loop's distribution behind the tokens before them."""
    inputs = picture("llava")
    for options in (LOOKUP, {"assistant_model": small("llava")}, {"assistant_model": text_model()}):
        torch.manual_seed(3)
        out = generate(pruned("llava"), inputs, 8, do_sample=True, top_k=0, **options)
        check_logits(out, conversation("llava", inputs), inputs)
        torch.manual_seed(4)
        other = generate(pruned("llava"), inputs, 8, do_sample=True, top_k=0, **options)
        assert not other.sequences.equal(out.sequences)


@pytest.mark.parametrize("name", LLAVA_TOO)
@pytest.mark.parametrize("options", [LOOKUP, pytest.param({"assistant_model": None}, marks=pytest.mark.slow)])
def test_a_later_turn(name: str, options: dict[str, Any]) -> None:
    """generate itself would run the whole conversation again there, behind what the cache holds."""
    if "assistant_model" in options:
        options = {"assistant_model": small(name)}
    inputs, cache = picture(name), DynamicCache()
    out = turn(pruned(name), inputs, cache, **options)
    by_hand = conversation(name, inputs)
    check_logits(out, by_hand, inputs)
    second = follow_up(inputs, out)
    later = turn(pruned(name), second, cache, **options)
    by_hand.feed(QUESTION)
    check_logits(later, by_hand, second)
    assert cache.get_seq_length() == later.sequences.shape[1] - 1


def test_what_stands_for_tokens_is_cut_behind_the_cache_and_nothing_else() -> None:
    """Of a conversation of 16 tokens, of which a cache holds 9; pixels and their mask are 16 wide too."""
    given = {
        "input_ids": torch.arange(16)[None], "position_ids": torch.arange(16).expand(3, 1, 16),
        "mm_token_type_ids": torch.zeros(1, 16), "attention_mask": torch.ones(1, 16),
        "pixel_values": torch.zeros(1, 3, 16, 16), "pixel_attention_mask": torch.ones(1, 4, 16, 16),
        "past_key_values": SimpleNamespace(get_seq_length=lambda: 9), "logits_to_keep": 1,
    }  # fmt: skip
    cut = behind_cache(given)
    names = ("input_ids", "position_ids", "mm_token_type_ids")
    assert {name for name in given if cut[name] is not given[name]} == {*names}
    assert all(cut[name].equal(given[name][..., 9:]) for name in names)
    embeds = torch.randn(1, 16, 4)
    assert behind_cache({**given, "input_ids": None, "inputs_embeds": embeds})["inputs_embeds"].equal(embeds[:, 9:])


@pytest.mark.slow
def test_embeddings_as_prompt() -> None:
    inputs = picture("llava")
    expected = generate(pruned("llava"), inputs, 6)
    embeds = {"inputs_embeds": plain("llava").get_input_embeddings()(inputs["input_ids"])}
    out = generate(pruned("llava"), inputs | embeds, 6, **LOOKUP)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), **ROUNDING)


def test_what_drafts_from_hidden_states_is_refused_by_its_name() -> None:
    """By what transformers says that a generator needs; that of Gemma 4's assistants is called SinglePosition..."""
    kinds = [kind for kind in vars(candidate_generator).values() if getattr(kind, "requires_model_outputs", False)]
    assert any(kind.__name__.startswith("SinglePosition") for kind in kinds)
    for kind in kinds:
        with pytest.raises(UnsupportedCallError, match=f"^{kind.__name__} drafts from the hidden states, or the keys"):
            begin_behind_prompt(pruned("llava"), kind.__new__(kind), torch.zeros(1, 1), {}, None, True)


def test_what_cannot_draft() -> None:
    for name in ("llava", "qwen2_5_vl"):
        with pytest.raises(AttributeError, match="has no attribute 'num_hidden_layers'"):
            generate(plain(name), picture(name), 4, assistant_early_exit=1)
        with pytest.raises(UnsupportedCallError, match=r"assistant_early_exit=1: transformers sets .* has none"):
            generate(pruned(name), picture(name), 4, assistant_early_exit=1)
    with pytest.raises(UnsupportedCallError, match=r"use_mtp drafts from the hidden states"):
        generate(pruned("llava"), picture("llava"), 4, use_mtp=True)
    with pytest.raises(UnsupportedCallError, match=r"speculation_type drafts from the hidden states"):
        generate(pruned("llava"), picture("llava"), 4, speculation_type="dflash", assistant_model=plain("llava"))
    with pytest.raises(UnsupportedCallError, match="needs the generate that optimize has put on the model"):
        type(plain("llava")).generate(pruned("llava"), **picture("llava"), max_new_tokens=4, **LOOKUP)
    with pytest.raises(ValueError, match="not supported with Static cache"):
        generate(pruned("llava"), picture("llava"), 4, cache_implementation="static", **LOOKUP)
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        generate(pruned("llava"), prompt("llava", *zoo.sizes("llava")[:2]), 4, **LOOKUP)
    assert new_tokens(generate(pruned("llava"), picture("llava"), 1), picture("llava"))
