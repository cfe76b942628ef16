"""Chat formats as real models have them, over a vocabulary of words, and conversations in them.

Every word of a conversation has a letter of its own in front that says whose it is: `q` and its turn for a user's
question, `a` for answers, `s` for the system, `t` for a tool.
"""
# ruff: noqa: E501  templates stand as they are written

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.template import learn

VISUAL = 6
"""Visual tokens of an image."""

PARTS = (
    "{%- macro parts(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}IMAGE{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Format:
    """One chat format.

    Attributes:
        template: of its tokenizer.
        special: its special tokens, beside the image's.
        ends: tokens that end a turn, as its generation config names them.
        image: what an image's placeholder becomes: tokens around VISUAL times <image>.
        named: special tokens that its config names too.
        system, tools: whether it takes such messages.
        vision_end: of `named`, what closes an image.
        placeholder: what its template writes for an image.
    """

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    image: tuple[str, ...] = ("<image>",) * VISUAL
    named: tuple[str, ...] = ()
    system: bool = True
    tools: bool = True
    vision_end: tuple[str, ...] = ()
    placeholder: str = "<image>"


CHATML = PARTS.replace("IMAGE", "<|vision_start|><image><|vision_end|>") + (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'tool' -%}{{ '<|im_start|>user\n<tool_response>\n' }}{{ parts(m['content']) }}"
    "{{ '\n</tool_response><|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + m['role'] + '\n' }}{{ parts(m['content']) }}"
    "{%- if m['tool_calls'] -%}{%- for c in m['tool_calls'] -%}{{ '\n<tool_call>\n' + c['function']['name'] + '\n</tool_call>' }}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
FORMATS = {
    "vicuna": Format(
        template=PARTS.replace("IMAGE", "{{ '<image>\n' }}") + (
            "{{ bos_token }}{%- for m in messages -%}"
            "{%- if m['role'] == 'system' -%}{{ parts(m['content']) + ' ' }}"
            "{%- elif m['role'] == 'user' -%}{{ 'USER : ' }}{{ parts(m['content']) + ' ' }}"
            "{%- else -%}{{ 'ASSISTANT : ' }}{{ parts(m['content']) + '</s>' }}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ 'ASSISTANT :' }}{%- endif -%}"
        ),
        special=("<s>", "</s>"), ends=("</s>",), named=("<s>",), tools=False,
    ),
    "qwen": Format(
        template=CHATML, special=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
        ends=("<|im_end|>", "<|endoftext|>"), image=("<|vision_start|>", *("<image>",) * VISUAL, "<|vision_end|>"),
        named=("<|vision_start|>", "<|vision_end|>"), vision_end=("<|vision_end|>",),
    ),
    "qwen thinking": Format(
        template=CHATML.replace("'<|im_start|>assistant\n' }}{%- endif", "'<|im_start|>assistant\n<think>\n' }}{%- endif"),
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
        ends=("<|im_end|>", "<|endoftext|>"), image=("<|vision_start|>", *("<image>",) * VISUAL, "<|vision_end|>"),
        named=("<|vision_start|>", "<|vision_end|>"), vision_end=("<|vision_end|>",),
    ),
    "no new lines": Format(  # as tokenizers of words write it: the role is the header's last id
        template=CHATML.replace("\n", " "), special=("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        ends=("<|im_end|>",), image=("<|vision_start|>", *("<image>",) * VISUAL, "<|vision_end|>"),
        named=("<|vision_start|>", "<|vision_end|>"), vision_end=("<|vision_end|>",),
    ),
    "llama 3": Format(
        template=PARTS.replace("IMAGE", "<image>") + (
            "{{ bos_token }}{%- for m in messages -%}"
            "{%- set role = 'ipython' if m['role'] == 'tool' else m['role'] -%}"
            "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{{ parts(m['content']) }}"
            "{%- if m['tool_calls'] -%}{%- for c in m['tool_calls'] -%}{{ c['function']['name'] }}{%- endfor -%}{%- endif -%}"
            "{{ '<|eot_id|>' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
        ),
        special=("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        ends=("<|end_of_text|>", "<|eot_id|>"), named=("<s>",),
    ),
    "mistral": Format(
        template=PARTS.replace("IMAGE", "<image>[IMG_END]") + (
            "{{ bos_token }}{%- for m in messages -%}"
            "{%- if m['role'] == 'system' -%}{{ '[SYSTEM_PROMPT]' }}{{ parts(m['content']) }}{{ '[/SYSTEM_PROMPT]' }}"
            "{%- elif m['role'] == 'user' -%}{{ '[INST]' }}{{ parts(m['content']) }}{{ '[/INST]' }}"
            "{%- elif m['role'] == 'tool' -%}{{ '[TOOL_RESULTS]' }}{{ parts(m['content']) }}{{ '[/TOOL_RESULTS]' }}"
            "{%- else -%}{{ ' ' }}{{ parts(m['content']) }}"
            "{%- if m['tool_calls'] -%}{%- for c in m['tool_calls'] -%}{{ '[TOOL_CALLS]' + c['function']['name'] }}"
            "{%- endfor -%}{%- endif -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
        ),
        special=("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]",
                 "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[IMG_BREAK]", "[IMG_END]"),
        ends=("</s>",), image=("<image>", "<image>", "<image>", "[IMG_BREAK]", "<image>", "<image>", "<image>", "[IMG_END]"),
        named=("<s>",),
    ),
    "gemma": Format(
        template=PARTS.replace("IMAGE", "<start_of_image>") + (
            "{{ bos_token }}{%- for m in messages -%}"
            "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
            "{%- if role not in ['user', 'model'] -%}{{ raise_exception('no such role') }}{%- endif -%}"
            "{{ '<start_of_turn>' + role + '\n' }}{{ parts(m['content']) }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
        ),
        special=("<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
        ends=("</s>", "<end_of_turn>"),
        image=("\n\n", "<start_of_image>", *("<image>",) * VISUAL, "<end_of_image>", "\n\n"),
        named=("<s>", "<start_of_image>", "<end_of_image>"), vision_end=("<end_of_image>",), placeholder="<start_of_image>", system=False, tools=False,
    ),
    "internvl": Format(
        template=CHATML.replace("<|vision_start|><image><|vision_end|>", "{{ '<image>\n' }}"),
        special=("<|im_start|>", "<|im_end|>", "<img>", "</img>"), ends=("<|im_end|>",),
        image=("<img>", *("<image>",) * VISUAL, "</img>"),
    ),
    "smolvlm": Format(
        template=PARTS.replace("IMAGE", "<image>") + (
            "{{ '<|im_start|>' }}{%- for m in messages -%}{{ m['role'] | capitalize }}"
            "{%- if m['content'] is not string and m['content'] and m['content'][0]['type'] == 'image' -%}{{ ':' }}{%- else -%}{{ ': ' }}{%- endif -%}"
            "{{ parts(m['content']) }}{{ '<end_of_utterance>\n' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
        ),
        special=("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>",
                 "<row_1_col_2>"),
        ends=("<end_of_utterance>",),
        image=("<fake_token_around_image>", "<row_1_col_1>", "<image>", "<image>", "<fake_token_around_image>",
               "<row_1_col_2>", "<image>", "<image>", "\n", "\n", "<fake_token_around_image>", "<global-img>",
               "<image>", "<image>", "<fake_token_around_image>"),
        tools=False,
    ),
}  # fmt: skip
PLAIN = [
    *("system", "user", "assistant", "model", "System", "User", "Assistant", "USER", "ASSISTANT", "ipython", "tool"),
    *(":", "?", "<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>", "<think>", "</think>"),
    *("apple", "blue", "red", "digit", "quiet", "house", "why", "not"),
]
WORDS = [f"{whose}{turn}{word}" for whose in "qast" for turn in "1234" for word in "abcde"]


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    form = FORMATS[name]
    special = ["<unk>", "<pad>", "<image>", *form.special]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys([*special, *PLAIN, "\n", "\n\n", *WORDS]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("▁+"), "removed"), pre_tokenizers.Split(Regex("\n|[:?]"), "isolated"),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", chat_template=form.template,
        bos_token="<s>" if "<s>" in form.special else None, eos_token=form.ends[0],
        additional_special_tokens=["<image>", *form.special],
    )  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """A conversation: what each turn of the user holds, and what is around.

    Attributes:
        turns: for each, words of the question and images before and behind it; the last is the newest.
    """

    turns: tuple[tuple[str, int, int], ...]
    system: bool = False
    generation: bool = True
    tool: bool = False


def question(turn: int, words: int = 3) -> str:
    return " ".join(f"q{turn}{word}" for word in "abcde"[:words])


def messages(talk: Talk) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if talk.system:
        made.append({"role": "system", "content": [{"type": "text", "text": "s1a s1b s1c"}]})
    for place, (text, before, behind) in enumerate(talk.turns, start=1):
        picture = {"type": "image"}
        said = [{"type": "text", "text": text}] if text else []
        made.append({"role": "user", "content": [picture] * before + said + [picture] * behind})
        if place < len(talk.turns):
            made.append({"role": "assistant", "content": [{"type": "text", "text": f"a{place}a a{place}b"}]})
    if talk.tool:
        call = {"type": "function", "id": "call00001", "function": {"name": "a4d", "arguments": {"x": "a4e"}}}
        made.append({"role": "assistant", "content": [{"type": "text", "text": ""}], "tool_calls": [call]})
        made.append({"role": "tool", "name": "a4d", "tool_call_id": "call00001",
                     "content": [{"type": "text", "text": "t1a t1b t1c"}]})  # fmt: skip
    return made


def ids_of(name: str, talk: Talk) -> list[int]:
    """The ids of a conversation, each image's placeholder, with what the template puts around it, made what a processor
    makes of it."""
    form, words = FORMATS[name], tokenizer(name)
    text = words.apply_chat_template(messages(talk), tokenize=False, add_generation_prompt=talk.generation)
    tokens = words.convert_ids_to_tokens(words(text, add_special_tokens=False)["input_ids"])
    made: list[str] = []
    for place, token in enumerate(tokens):
        if token == form.placeholder:
            opened = len(made) > 0 and made[-1] == form.image[0] != token
            made[len(made) - opened :] = form.image
        elif not (token == form.image[-1] != form.placeholder and tokens[place - 1] == form.placeholder):
            made.append(token)
    return words.convert_tokens_to_ids(made)


def special_of(name: str) -> SpecialIds:
    """What a model's configs name."""
    form, words = FORMATS[name], tokenizer(name)

    def number(tokens: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(words.convert_tokens_to_ids(list(tokens)))

    special = {words.pad_token_id, words.convert_tokens_to_ids("<image>"), *number(form.named), *number(form.ends)}
    return SpecialIds(number(form.vision_end), number(form.ends), tuple(sorted(special)))


def batch(name: str, lines: list[list[int]], left: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, visual, real), padded."""
    pad, image = tokenizer(name).pad_token_id, tokenizer(name).convert_tokens_to_ids("<image>")
    longest = max(map(len, lines))
    rows = [[pad] * (longest - len(line)) + line if left else line + [pad] * (longest - len(line)) for line in lines]
    ids = torch.from_numpy(np.array(rows, np.int64))
    return ids, ids == image, ids != pad


def words_at(name: str, ids: Tensor, mask: Tensor) -> str:
    """The words at these places of a row."""
    return " ".join(tokenizer(name).convert_ids_to_tokens(ids[mask].tolist()))


@cache
def chat(name: str) -> ChatFormat:
    """What is learned of a format from its template."""
    return learn(tokenizer(name), special_of(name).end_of_turn)
