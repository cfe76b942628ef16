"""What is learned from a chat template: what closes texts, what tools and systems say, and what says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hawk_compile.errors import ConfigError
from hawk_compile.plan.template import chat_of, chat_of_settings, learn
from hawk_compile.settings.config import HawkConfig
from tests.plan import formats
from tests.plan.formats import Talk, question


@pytest.mark.parametrize(("template", "why"), [
    (None, "it has no chat template"),
    ("{{ raise_exception('no') }}", "it renders no conversation of two turns"),
    ("{% for m in messages %}{{ m['content'][0]['text'] }} {% endfor %}", "more than white space"),
    ("{% for m in messages %}User : {{ m['content'][0]['text'] }} {% endfor %}", "does not find it"),
    ("{% for m in messages %}User : hello {% endfor %}", "it renders no conversation of two turns"),
])  # fmt: skip
def test_a_template_that_says_nothing_is_not_used(template: str | None, why: str) -> None:
    source = formats.tokenizer.__wrapped__("qwen")
    source.chat_template = template
    found = chat_of(source, "", formats.special_of("qwen").end_of_turn)
    assert found.form is None and found.lasting and why in found.origin
    with pytest.raises(ConfigError, match=f"processor=.*{why}.*: give one with the model's chat template"):
        chat_of_settings(HawkConfig(processor=source), "", formats.special_of("qwen").end_of_turn)


@pytest.mark.parametrize("which", [1, 8, 40, 80])
def test_what_a_tokenizer_raises_does_not_last(which: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of learning too, where a template that refuses a role is passed over."""
    source = formats.tokenizer.__wrapped__("qwen")
    source.save_pretrained(tmp_path)
    ends = formats.special_of("qwen").end_of_turn
    encode, calls = PreTrainedTokenizerFast._encode_plus, 0

    def borrowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == which:
            raise RuntimeError("Already borrowed")
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", borrowed)
    with pytest.raises(ConfigError, match=r"processor=.*RuntimeError while it was read: Already borrowed: call again"):
        chat_of_settings(HawkConfig(processor=source), "", ends)
    assert chat_of_settings(HawkConfig(processor=source), "", ends).form == formats.chat("qwen")
    calls = 0
    read = chat_of_settings(HawkConfig(), str(tmp_path), ends)
    assert read.form is None and not read.lasting and "Already borrowed" in read.origin


def test_a_checkpoint_is_looked_for_on_this_machine_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    formats.tokenizer("qwen").save_pretrained(tmp_path)
    ends = formats.special_of("qwen").end_of_turn
    assert chat_of(None, str(tmp_path), ends).form == formats.chat("qwen")
    assert chat_of(None, str(tmp_path), ends, chosen_ends=True).form is None
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert "no tokenizer lies there" in chat_of(None, "nobody/nothing", ends).origin
    assert chat_of(None, "", ends).origin == "none: the model was not loaded from a checkpoint"


def joining_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary that joins what ends a sentence with the new lines behind it, as Qwen's and Llama 3's."""
    made = Tokenizer(models.BPE())
    split = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<image>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = ["What is it?\n\nAssistant: blue.\n\nUser: why not?\n\n", "apple 7 green zebras Quiet house"]
    made.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"],
        chat_template=template,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["why not", "What is it?", "blue."])
def test_what_closes_a_text_may_begin_in_its_last_id(text: str) -> None:
    words = joining_tokenizer(
        "{%- for m in messages -%}"
        "{%- set said = m['content'] if m['content'] is string else m['content'][0]['text'] -%}"
        "{%- if m['role'] == 'user' -%}{{ 'User: ' + said + '\n\n' }}{%- else -%}{{ 'Assistant: ' + said + eos_token }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    )
    form = learn(words, (words.eos_token_id,))
    ids = np.array(words(f"User: blue?\n\nAssistant: blue.</s>User: {text}\n\nAssistant:")["input_ids"])
    (_, (start, stop)) = form.turns(ids, np.array([words.eos_token_id]))
    assert words.decode(ids[start:stop].tolist()).strip() == text


def test_a_tools_message_is_known_whatever_tool_was_called() -> None:
    """Where the end of a turn is no end-of-turn id, so that the call and its result are one stretch of ids."""
    source = formats.tokenizer("qwen")
    ends = (source.convert_tokens_to_ids("<|endoftext|>"),)
    form = learn(source, ends)
    assert [source.convert_ids_to_tokens(list(pattern)) for pattern in form.tools] == [
        ["<|im_start|>", "user", "\n", "<tool_response>", "\n"]
    ]
    talk = Talk(((question(1), 1, 0), (question(2), 0, 0)), tool=True, system=True)
    line = np.array(formats.ids_of("qwen", talk))
    (*_, (start, stop)) = form.turns(line, np.array(ends))
    assert source.convert_ids_to_tokens(line[start:stop].tolist()) == question(2).split(" ")


IN_THE_USERS_TURN = (
    "{{ bos_token }}{%- set told = namespace(text='') -%}{%- for m in messages -%}"
    "{%- set said = m['content'] if m['content'] is string else m['content'][0]['text'] -%}"
    "{%- if m['role'] == 'system' -%}{%- set told.text = SYSTEM -%}"
    "{%- elif m['role'] == 'user' -%}{{ '[INST]' + told.text + said + '[/INST]' }}{%- set told.text = '' -%}"
    "{%- else -%}{{ said + eos_token }}{%- endif -%}{%- endfor -%}"
)


@pytest.mark.parametrize(("system", "told"), [
    ("'user : \n' + said + ' \n tool : \n\n'", ["q1a", "q1b"]), ("said + '\n\n'", ["s1a", "s1b", "q1a", "q1b"]),
])  # fmt: skip
def test_a_system_prompt_in_the_users_turn(system: str, told: list[str]) -> None:
    """Marked, it does not vote; unmarked, the report says that it does. Without one the template is exact."""
    source = formats.tokenizer.__wrapped__("mistral")
    source.chat_template = IN_THE_USERS_TURN.replace("SYSTEM", system)
    ends = (source.eos_token_id,)
    found = chat_of(source, "", ends)
    assert found.form is not None and ("whose system prompt votes" in found.origin) == (told[0] == "s1a")
    asked = {"role": "user", "content": "q1a q1b"}
    for said, wanted in (([{"role": "system", "content": "s1a s1b"}, asked], told), ([asked], ["q1a", "q1b"])):
        text = source.apply_chat_template(said, tokenize=False)
        ids = np.array(source(text, add_special_tokens=False)["input_ids"])
        start, stop = found.form.turns(ids, np.array(ends))[-1]
        words = source.convert_ids_to_tokens(ids[start:stop].tolist())
        assert [word for word in words if word != "\n"] == wanted
