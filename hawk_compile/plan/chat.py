"""Where users' texts stand in the ids of a known chat format; `template.py` learns one."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = tuple[int, ...]
Row = NDArray[np.int64]
Span = tuple[int, int]

FEW = 12
"""Ids that are faster to look for one by one."""


@dataclass(frozen=True)
class ChatFormat:
    """Where users' texts stand in the ids of one chat template.

    Attributes:
        opens: patterns that end where a user's text begins.
        closes: patterns that begin where it ends; so do end-of-turn ids and the next open.
        tools: patterns that end where the message of a tool begins, and in which an open stands too.
        tail: what may stand behind a text at the very end of a prompt without a generation header.
        blank: ids of white space, which beside an image is the template's or the processor's.
        special: ids that are no text.
    """

    opens: tuple[Ids, ...]
    closes: tuple[Ids, ...] = ()
    tools: tuple[Ids, ...] = ()
    tail: Ids = ()
    blank: Ids = ()
    special: Ids = ()

    def turns(self, ids: Row, ends: Row) -> list[Span]:
        """The users' texts of a row, oldest first.

        Args:
            ids: [N] int64, without padding.
            ends: ids that end a turn.
        """
        begins, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for pattern in self.opens:
            begins.append(self.begins(ids, pattern))
            starts.append(begins[-1] + len(pattern))
        opened = np.unique(np.concatenate(starts))
        for pattern in self.tools:
            for place in self.begins(ids, pattern):
                opened = opened[(opened <= place) | (opened > place + len(pattern))]
        stops = [*begins, *(places(ids, pattern) for pattern in self.closes), np.flatnonzero(is_in(ids, ends))]
        stop = np.unique(np.concatenate([*stops, [len(ids)]]))
        spans = [(int(start), int(stop[np.searchsorted(stop, start)])) for start in opened]
        if spans and self.tail and spans[-1][1] == len(ids) and tuple(ids[-len(self.tail) :]) == self.tail:
            start, end = spans[-1]
            spans[-1] = (start, max(start, end - len(self.tail)))
        return spans

    def begins(self, ids: Row, pattern: Ids) -> Row:
        """Where a pattern begins. White space that ends it may be another id: a tokenizer joins it with what a text
        begins with, or what a processor writes before an image ("user\\n" and "\\n\\n<image>" with an id for three ends
        of lines)."""
        head = pattern[:-1]
        if len(pattern) < 2 or pattern[-1] not in self.blank or not set(head) - set(self.blank):
            return places(ids, pattern)
        found = places(ids[:-1], head)
        return found[is_in(ids[found + len(head)], self.blank)]

    def to_json(self) -> dict[str, Any]:
        """As lists, for a file."""
        return {each.name: json.loads(json.dumps(getattr(self, each.name))) for each in fields(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ChatFormat":
        """Raises TypeError or ValueError where that is not what `to_json` made."""
        nested: dict[str, Any] = {
            name: tuple(tuple(map(int, each)) for each in content[name]) for name in ("opens", "closes", "tools")
        }
        flat: dict[str, Any] = {name: tuple(map(int, content[name])) for name in ("tail", "blank", "special")}
        return cls(**nested, **flat)

    @functools.cached_property
    def special_row(self) -> Row:
        """`special` as an array: some tokenizers have thousands."""
        return np.array(self.special, np.int64)

    @property
    def ids(self) -> set[int]:
        """Every id that it reads."""
        patterns = (*self.opens, *self.closes, *self.tools, self.tail, self.blank, self.special)
        return {each for pattern in patterns for each in pattern}


def places(ids: Row, pattern: Sequence[int]) -> Row:
    """Where a pattern begins in a row."""
    count = len(ids) - len(pattern) + 1
    if count <= 0 or not pattern:
        return np.empty(0, np.int64)
    equal = ids[:count] == pattern[0]
    for offset in range(1, len(pattern)):
        equal &= ids[offset : offset + count] == pattern[offset]
    return np.flatnonzero(equal)


def is_in(ids: Row, wanted: Sequence[int] | Row) -> NDArray[np.bool_]:
    """Where any of the wanted ids stands."""
    if len(wanted) > FEW:
        return np.isin(ids, wanted)
    there = np.zeros(len(ids), bool)
    for number in wanted:
        there |= ids == number
    return there


@dataclass(frozen=True)
class Chat:
    """The format of a model's chats, if it is known, and where that is from, or why it is not.

    Attributes:
        lasting: whether another attempt would find the same.
    """

    form: ChatFormat | None = None
    origin: str = "no chat template was looked for"
    lasting: bool = True
