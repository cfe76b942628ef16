"""One row of a batch, cut into users' turns: which of its text votes."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from hawk_compile.plan.chat import ChatFormat, Row, Span, is_in
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.turns import users_turns

Mask = NDArray[np.bool_]

STRUCTURE = 4
"""Ids between two visual tokens, at most, that are the image's own (tags of tiles, ends of lines), not a user's."""

LABEL = 16
"""Ids between two visual tokens, at most, that may tell a frame's time or an image's number; they do where half of them
stand between the visual tokens before or behind as well."""

REST = 2
"""Ids behind an image, at most, that close it rather than ask something, where much text stands before it."""


class QuerySource(IntEnum):
    """Where a row's question stands."""

    AFTER_IMAGE = 0
    """In the newest user's turn, behind its last image if it has any."""
    TURN = 1
    """In that turn, before its last image."""
    EARLIER_TURN = 2
    """In an earlier user's turn, since the newest holds no text."""
    ANY_TEXT = 3
    """No user's turn holds text: all text of the row, special ids last."""
    GIVEN = 4
    """The call says where."""


class QuestionRule(IntEnum):
    """How a row's question was found."""

    TEMPLATE = 0
    IDS = 1
    GIVEN = 2


class RowTurns:
    """One row of a batch, cut into users' turns."""

    def __init__(self, ids: Row, visual: Mask, real: Mask, special: SpecialIds, chat: ChatFormat | None):
        self.length = len(ids)
        self.place = np.flatnonzero(real)
        self.ids, self.visual = ids[self.place], visual[self.place]
        self.plain = ~self.visual & ~is_in(self.ids, special.special)
        if chat is not None:
            self.plain &= ~is_in(self.ids, chat.special_row)
        self.shown = self.visual | is_in(self.ids, special.vision_end)
        ends = np.array(special.end_of_turn, np.int64)
        turns = chat.turns(self.ids, ends) if chat is not None else []
        self.rule = QuestionRule.TEMPLATE if turns else QuestionRule.IDS
        if chat is not None and turns:
            self.plain &= ~self.beside_images(is_in(self.ids, chat.blank))
        # Ids that close an image and have no name: where it is known that what stands before the image is the user's,
        # one or two behind it are more likely such ids than a question.
        self.rest = 0
        if not turns:
            turns, known = users_turns(self.ids, self.visual, ends, bool((self.shown & ~self.visual).any()))
            self.rest = REST if known else 0
        self.turns = turns

    def text(self, turn: Span) -> tuple[Row, QuerySource]:
        """The places of one turn's text that vote."""
        start, stop = turn
        here = np.arange(start, stop)
        shown = here[self.shown[start:stop]]
        begin = int(shown[-1]) + 1 if len(shown) else start
        after = here[(here >= begin) & self.plain[start:stop]]
        text = here[self.plain[start:stop] & ~self.structure(shown, here)]
        if len(after) > self.rest_of(shown, text, after) or (len(after) and len(text) <= 2 * len(after)):
            return after, QuerySource.AFTER_IMAGE
        return (text if len(text) else here[self.plain[start:stop]]), QuerySource.TURN

    def rest_of(self, shown: Row, text: Row, after: Row) -> int:
        """How many ids behind the last image may belong to it; behind an id that closes it, one that opens it too."""
        if not len(shown) or self.visual[shown[-1]]:
            return self.rest
        before = text[text < shown[-1]]
        same = len(before) > 0 and len(after) == 1 and self.ids[before[-1]] == self.ids[after[0]]
        return min(self.rest, int(same))

    def beside_images(self, blank: Mask) -> Mask:
        """Which white space stands beside a visual token, with nothing between that is text."""
        solid = np.flatnonzero(self.visual | (self.plain & ~blank))
        if not len(solid):
            return blank
        here = np.arange(len(blank))
        behind = np.searchsorted(solid, here, side="right")
        left, right = solid[np.maximum(behind - 1, 0)], solid[np.minimum(behind, len(solid) - 1)]
        return blank & ((self.visual[left] & (left < here)) | (self.visual[right] & (right > here)))

    def structure(self, shown: Row, here: Row) -> Mask:
        """Which places of a turn stand in short gaps between visual tokens, or in such as hold labels."""
        if len(shown) < 2:
            return np.zeros(len(here), bool)
        behind = np.searchsorted(shown, here)
        inside = (behind > 0) & (behind < len(shown))
        gap = shown[np.minimum(behind, len(shown) - 1)] - shown[np.maximum(behind - 1, 0)] - 1
        return inside & (gap <= STRUCTURE) | is_in(here, self.labels(shown))

    def labels(self, shown: Row) -> list[int]:
        """The places of gaps between visual tokens that say much the same as a gap beside them."""
        size = np.diff(shown) - 1
        starts = np.flatnonzero((size > STRUCTURE) & (size <= LABEL))
        gaps = [range(shown[at] + 1, shown[at + 1]) for at in starts]
        texts = [self.ids[gap.start : gap.stop].tolist() for gap in gaps]
        return [
            place for at, gap in enumerate(gaps)
            if any(alike(texts[at], other) for other in (*texts[max(at - 1, 0) : at], *texts[at + 1 : at + 2]))
            for place in gap
        ]  # fmt: skip

    def newest(self) -> tuple[Mask, QuerySource]:
        """The newest user's text that is not empty."""
        return self.turn_or_any(len(self.turns) - 1)

    def turn_or_any(self, turn: int) -> tuple[Mask, QuerySource]:
        """The text of a turn; else of the last one before it that has any, else of the first one behind it."""
        turn = min(turn, len(self.turns) - 1)
        for number in (*range(turn, -1, -1), *range(turn + 1, len(self.turns))):
            text, source = self.text(self.turns[number])
            if len(text):
                return self.spread(text), source if number == turn else QuerySource.EARLIER_TURN
        anything = np.flatnonzero(self.plain if self.plain.any() else ~self.visual)
        return self.spread(anything), QuerySource.ANY_TEXT

    def own(self) -> list[tuple[Mask, QuerySource, Mask]]:
        """(question, source, visual tokens) of every turn that has images; the newest question where none has."""
        seen = np.flatnonzero(self.visual)
        starts = np.array([start for start, _ in self.turns] or [0])
        turn = np.maximum(np.searchsorted(starts, seen, side="right") - 1, 0)
        groups = [(*self.turn_or_any(int(number)), self.spread(seen[turn == number])) for number in np.unique(turn)]
        return groups or [(*self.newest(), self.spread(seen))]

    def spread(self, chosen: Row) -> Mask:
        """[S] bool: places among the real tokens as a mask of the padded row."""
        mask = np.zeros(self.length, bool)
        mask[self.place[chosen]] = True
        return mask


def alike(text: list[int], other: list[int]) -> bool:
    """Whether at least half of a text's ids stand in another."""
    return 2 * sum(number in other for number in text) >= len(text)
