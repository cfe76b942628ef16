"""What a chat template puts around a user's text, learned by rendering it with marked texts.

Texts that differ at one place, and ids that are equal on both sides of it, show what the template puts before a user's
text (`opens`) and behind it (`closes`), whatever the tokenizer merges. What was learned is then tried on every
conversation that was rendered: a format that does not find the marked text in all of them is not used.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hawk_compile.compat.models import file_of
from hawk_compile.plan.chat import Chat, ChatFormat, Ids, Row, Span, places

Make = Callable[[str], Ids]
"""The ids of a conversation with this text in one of its places."""

LONGEST = 24
"""Ids of a pattern: more than any header has, and enough to tell one from text."""
WORDS = ("apple", "7 green zebras", "Quiet house", "why not", "blue", "red digit")
BLANKS = (" ", "  ", "\n", "\n\n", "\n\n\n", " \n", " \n\n", "▁", "Ċ", "ĊĊ")
SAMPLES = 400
"""Ids of a vocabulary that are looked at where it does not know the words."""


class UnknownTemplate(Exception):
    """Why a chat template says nothing of where a user's text stands."""


def shared_start(rows: Sequence[Ids]) -> Ids:
    """The longest common prefix."""
    length = 0
    for each in zip(*rows, strict=False):
        if len(set(each)) > 1:
            break
        length += 1
    return rows[0][:length]


def shared_end(rows: Sequence[Ids]) -> Ids:
    """The longest common suffix."""
    return shared_start([row[::-1] for row in rows])[::-1]


class Template:
    """A chat template with its tokenizer."""

    def __init__(self, source: Any):
        self.tokenizer = getattr(source, "tokenizer", source)
        self.source = source if getattr(source, "chat_template", None) else self.tokenizer
        if not getattr(self.source, "chat_template", None):
            raise UnknownTemplate("it has no chat template")
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        self.special = special - {self.tokenizer.unk_token_id}
        self.texts = self.pick_texts()

    def encode(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pick_texts(self) -> list[str]:
        """Three texts that the vocabulary knows, which begin and end with ids of their own."""
        picked: list[str] = []
        begins: set[int] = set()
        ends: set[int] = set()
        for text in self.candidates():
            ids = self.encode(text)
            if ids and not {*ids} & {*self.special, self.tokenizer.unk_token_id} \
                    and ids[0] not in begins and ids[-1] not in ends:  # fmt: skip
                picked.append(text)
                begins.add(ids[0])
                ends.add(ids[-1])
            if len(picked) == 3:
                return picked
        raise UnknownTemplate("its tokenizer knows too few words to mark texts with")

    def candidates(self) -> Iterator[str]:
        yield from WORDS
        size = len(self.tokenizer)
        for number in range(size - 1, -1, -max(1, size // SAMPLES)):
            if (text := self.tokenizer.decode([number]).strip()).isalnum():
                yield text

    def render(self, messages: list[dict[str, Any]], generation: bool = True) -> Ids:
        text = self.source.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return self.encode(text)

    def around(self, make: Make) -> tuple[Ids, Ids]:
        """What stands before and behind the one text that differs.

        Raises:
            UnknownTemplate: the text is not in what was rendered.
        """
        rows = [make(text) for text in self.texts]
        before = shared_start(rows)
        after = shared_end([row[len(before) :] for row in rows])
        if len(set(rows)) < len(rows):
            raise UnknownTemplate("a message's text is missing in what it renders")
        return before, after

    def blank(self) -> Ids:
        """The ids of white space of the usual lengths."""
        known = [self.encode(text) for text in BLANKS]
        known.append(tuple(self.tokenizer.convert_tokens_to_ids(list(BLANKS))))
        unknown = {self.tokenizer.unk_token_id, None}
        return tuple(sorted(each for each in {*sum(known, ())} - unknown
                            if each not in self.special and not self.tokenizer.decode([each]).strip()))  # fmt: skip

    def is_header(self, pattern: Ids) -> bool:
        """Whether a pattern is more than white space, which stands in texts too."""
        return bool(self.special & {*pattern}) or any(map(str.isalnum, self.tokenizer.decode(list(pattern))))

    def through_special(self, pattern: Ids) -> Ids:
        """Up to its first special id, which no text holds."""
        stop = next((place for place, each in enumerate(pattern) if each in self.special), len(pattern) - 1)
        return pattern[: stop + 1]

    def from_special(self, pattern: Ids, ends: Sequence[int]) -> Ids:
        """Without what closes the message before, where a special id of its own still tells it from text."""
        pattern = pattern[-LONGEST:]
        for place in range(len(pattern) - 1, -1, -1):
            if pattern[place] in ends and self.special & {*pattern[place + 1 :]}:
                pattern = pattern[place + 1 :]
                break
        first = next((place for place, each in enumerate(pattern) if each in self.special), 0)
        return pattern if any(map(str.isalnum, self.tokenizer.decode(list(pattern[:first])))) else pattern[first:]


def message(role: str, text: str, listed: bool) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}] if listed else text}


class Conversations:
    """Conversations of marked texts, with contents as lists of parts or as plain strings."""

    def __init__(self, template: Template, listed: bool):
        self.template, self.listed = template, listed
        self.first, self.second, self.third = template.texts

    def render(self, *said: tuple[str, str], generation: bool = True) -> Ids:
        return self.template.render([message(role, text, self.listed) for role, text in said], generation)

    def one(self, generation: bool = True) -> Make:
        return lambda text: self.render(("user", text), generation=generation)

    def two(self, answer: str, generation: bool = True) -> Make:
        return lambda text: self.render(
            ("user", self.first), ("assistant", answer), ("user", text), generation=generation
        )

    def answered(self, answer: str) -> Make:
        return lambda text: self.render(("user", text), ("assistant", answer), ("user", self.second))

    def three(self) -> Make:
        said = (("user", self.third), ("assistant", self.first), ("user", self.second), ("assistant", self.third))
        return lambda text: self.render(*said, ("user", text))

    def after_system(self, system: str) -> Make:
        return lambda text: self.render(("system", system), ("user", text))

    def before_tool(self, name: str, result: str) -> Make:
        """A user's text, the call of a tool and what it returned."""
        return lambda text: self.with_tool(text, name, result)

    def tool_message(self, asked: str, name: str) -> Make:
        return lambda text: self.with_tool(asked, name, text)

    def with_tool(self, asked: str, name: str, result: str) -> Ids:
        call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": {"x": name}}}
        returned = {**message("tool", result, self.listed), "name": name, "tool_call_id": "call00001"}
        called = {**message("assistant", "", self.listed), "tool_calls": [call]}
        return self.template.render([message("user", asked, self.listed), called, returned])


def attempt(template: Template, *makes: Make) -> list[tuple[Ids, Ids]]:
    """What surrounds the text in each conversation; nothing where the template does not take such a conversation."""
    try:
        return [template.around(make) for make in makes]
    except Exception:  # templates raise errors of any kind at roles that they do not know
        return []


def learn(source: Any, ends: Sequence[int]) -> ChatFormat:
    """The format of a processor's or tokenizer's chat template.

    Args:
        ends: ids that end a turn.

    Raises:
        UnknownTemplate: it has none, or one whose texts cannot be found by what surrounds them.
    """
    template = Template(source)
    for listed in (True, False):
        talk = Conversations(template, listed)
        if attempt(template, talk.one(), talk.two(talk.second), talk.two(talk.third), talk.answered(talk.first)):
            return checked(template, talk, learned(template, talk, ends), ends)
    raise UnknownTemplate("it renders no conversation of two turns")


def learned(template: Template, talk: Conversations, ends: Sequence[int]) -> ChatFormat:
    closes, tail = closes_of(template, talk)
    return ChatFormat(
        opens=(opens := opens_of(template, talk, ends)),
        closes=closes,
        tools=tools_of(template, talk, opens, ends),
        tail=tail,
        blank=template.blank(),
        special=tuple(sorted(template.special)),
    )


def opens_of(template: Template, talk: Conversations, ends: Sequence[int]) -> tuple[Ids, ...]:
    """What stands before the first and before a later text: what they share, if that is a header, else each."""
    (first, _), (one, _), (other, _) = attempt(
        template, talk.one(), talk.two(talk.second), talk.two(talk.third)
    )
    later = shared_end([one, other])
    systems = attempt(template, talk.after_system(talk.second), talk.after_system(talk.third))
    seen = [first, later, *([shared_end([before for before, _ in systems])] if systems else [])]
    opens: list[Ids] = []
    shared = shared_end([first, later])
    if template.is_header(shared):
        opens.append(template.from_special(shared, ends))
    for pattern in seen:
        if template.is_header(pattern) and not any(pattern[-len(each) :] == each for each in opens):
            opens.append(template.from_special(pattern, ends))
    if not opens:
        raise UnknownTemplate("nothing that is more than white space stands before a user's text")
    return tuple(opens)


def closes_of(template: Template, talk: Conversations) -> tuple[tuple[Ids, ...], Ids]:
    """What stands behind a text: (patterns that close it, what is left of that at the end of a prompt)."""
    (_, asked), (_, one), (_, other) = attempt(
        template, talk.one(), talk.answered(talk.first), talk.answered(talk.third)
    )
    unasked = attempt(template, talk.one(generation=False))
    end = unasked[0][1] if unasked else ()
    both = shared_start([asked, end])
    if template.special & {*both}:
        return (template.through_special(both),), ()
    answered = shared_start([one, other])
    close = template.through_special(shared_start([asked, answered]) if asked else answered)
    return ((close,) if close and template.is_header(close) else ()), end


def tools_of(template: Template, talk: Conversations, opens: tuple[Ids, ...], ends: Sequence[int]) -> tuple[Ids, ...]:
    """What stands before a tool's message, where a user's text could begin there too."""
    tools = attempt(template, talk.tool_message(talk.first, "weather"), talk.tool_message(talk.second, "clock"))
    if not tools:
        return ()
    pattern = shared_end([before for before, _ in tools])[-LONGEST:]
    closed = max((place for place, each in enumerate(pattern) if each in ends), default=-1)
    pattern = pattern[closed + 1 :] if template.is_header(pattern[closed + 1 :]) else pattern
    row = np.array(pattern, np.int64)
    inside = [each for each in opens if len(places(row, each))]
    return (pattern,) if inside and pattern not in opens else ()


def checked(template: Template, talk: Conversations, form: ChatFormat, ends: Sequence[int]) -> ChatFormat:
    """The format, if it finds the newest user's text in every conversation that the template renders."""
    special = np.array(form.special, np.int64)
    makes = [
        (1, talk.one()), (1, talk.one(generation=False)), (2, talk.two(talk.second)),
        (2, talk.two(talk.third, generation=False)), (3, talk.three()), (1, talk.after_system(talk.second)),
        (1, talk.before_tool("weather", talk.second)),
    ]  # fmt: skip
    for count, make in makes:
        for before, after in attempt(template, make):
            row = np.array(make(talk.first), np.int64)
            turns = form.turns(row, np.array(ends, np.int64))
            wanted = (len(before), len(row) - len(after))
            if len(turns) != count or (turns[-1] != wanted and not only_special(row, turns[-1], wanted, special)):
                raise UnknownTemplate("what surrounds a user's text does not find it in all conversations")
    return form


def only_special(row: Row, span: Span, wanted: Span, special: Row) -> bool:
    """Whether a span holds the text that is wanted, and beside it ids that are no text."""
    (start, stop), (first, last) = span, wanted
    beside = np.concatenate([row[start:first], row[last:stop]])
    return start <= first and stop >= last and bool(np.isin(beside, special).all())


def source_at(path: str) -> Any:
    """The tokenizer of a checkpoint that is on this machine, with its chat template; nothing is downloaded or run.

    Raises:
        UnknownTemplate: there is none.
    """
    from transformers import AutoTokenizer

    here: dict[str, Any] = {"local_files_only": True}
    if not path:
        raise UnknownTemplate("the model was not loaded from a checkpoint")
    try:
        names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
        files = {name: file_of(path, name) for name in names}
        if not files["tokenizer_config.json"]:
            raise UnknownTemplate("no tokenizer lies there")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **here)
        if not tokenizer.chat_template and files["chat_template.json"]:
            with open(os.fspath(files["chat_template.json"]), encoding="utf-8") as file:
                tokenizer.chat_template = json.load(file)["chat_template"]
    except UnknownTemplate:
        raise
    except Exception as error:  # a tokenizer that cannot be loaded here, for whatever reason, is none
        raise UnknownTemplate(f"its tokenizer cannot be loaded ({type(error).__name__})") from error
    return tokenizer


def chat_of(processor: Any, path: str, ends: Sequence[int], chosen_ends: bool = False) -> Chat:
    """What can be learned for a model.

    Args:
        processor: a processor or tokenizer; None: that of the checkpoint at `path`.
        ends: ids that end a turn.
        chosen_ends: whether they are the user's own choice, which a checkpoint's template does not overrule.
    """
    where = "processor" if processor is not None else path or "the checkpoint"
    if processor is None and chosen_ends:
        return Chat(None, "end_of_turn_token_id is set, and no processor")
    try:
        return Chat(learn(processor if processor is not None else source_at(path), ends), f"chat template of {where}")
    except UnknownTemplate as error:
        return Chat(None, f"chat template of {where}: {error}")
    except Exception as error:  # what a foreign template raises must not stop a prefill
        return Chat(None, f"chat template of {where}: {type(error).__name__} while it was rendered")
