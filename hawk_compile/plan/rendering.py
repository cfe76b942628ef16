"""Conversations of marked texts, rendered by a chat template, and what stands around the one text that differs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hawk_compile.plan.chat import Ids

Make = Callable[[str], Ids]
"""The ids of a conversation with this text in one of its places."""

LONGEST = 24
"""Ids of a pattern: more than any header has, and enough to tell one from text."""
WORDS = ("apple", "7 green zebras", "Quiet house", "why not", "blue", "red digit")
BLANKS = (" ", "  ", "\n", "\n\n", "\n\n\n", "\n\n\n\n", " \n", " \n\n", "▁", "Ċ", "ĊĊ")
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
        """The ids of a conversation.

        Raises:
            UnknownTemplate: the template does not take such a conversation. What a tokenizer raises, which another
                thread may be using, says nothing of the template.
        """
        try:
            text = self.source.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except (RuntimeError, MemoryError, OSError):  # by no template
            raise
        except Exception as error:  # templates raise errors of any kind at roles that they do not know
            raise UnknownTemplate(f"it does not render a conversation ({error})") from error
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

    def without_blank(self, pattern: Ids) -> Ids:
        """Without the white space that it begins with, which a tokenizer may join with the end of a text ("?\\n")."""
        blank = self.blank()
        first = next((place for place, each in enumerate(pattern) if each not in blank), len(pattern))
        return pattern[first:]

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
    except UnknownTemplate:
        return []
