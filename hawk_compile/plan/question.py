"""The question: which text tokens vote on the visual ones (HAWK, arXiv 2604.07812).

The newest user's text votes, in every chat format, and nothing else. Where users' texts stand is known from the chat
template (`template.py`, `chat.py`), else from the ids alone (`turns.py`). Of the turn, what stands behind its last
image votes, as in the reference implementation; where nothing does, all of the turn; where it holds no text, an earlier
user's. With `question="own"` every image is scored by the text of its own turn. A question that a call gives itself
goes before all.

All of it runs on the host, on ids that were copied there once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.errors import InputError
from hawk_compile.plan.chat import ChatFormat, Row, Span, is_in, places
from hawk_compile.plan.turns import users_turns
from hawk_compile.settings.config import HawkConfig

Mask = NDArray[np.bool_]

VISION_END_NAMES = (
    "vision_end_token_id", "eoi_token_id", "eoi_token_index", "image_end_token_id", "audio_end_token_id",
)  # fmt: skip
STRUCTURE = 4
"""Ids between two visual tokens, at most, that are the image's own (tags of tiles, ends of lines), not a user's."""

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


@dataclass(frozen=True)
class SpecialIds:
    """Ids that steer the choice of the question; each may be empty."""

    vision_end: tuple[int, ...]
    end_of_turn: tuple[int, ...]
    special: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """What votes in B rows of S positions, on the host.

    Attributes:
        mask: [B, S] bool, the text that votes; [B, G, S] where images have questions of their own.
        images: [B, G, S] bool, the visual tokens that each of these G questions scores; None where there is one.
        source: a `QuerySource` per row.
        rule: a `QuestionRule` per row.
    """

    mask: Tensor
    images: Tensor | None
    source: list[QuerySource]
    rule: list[QuestionRule]


def special_ids(model: PreTrainedModel, config: HawkConfig) -> SpecialIds:
    """The ids of a model: as the settings give them, else as its configs name them."""
    named = {name: number for name in dir(model.config) if name.endswith(("_token_id", "_token_index"))
             and isinstance(number := getattr(model.config, name, None), int)}
    vision_end = (config.vision_end_token_id,) if config.vision_end_token_id is not None else tuple(
        named[name] for name in VISION_END_NAMES if name in named)
    generation = model.generation_config
    turn = config.end_of_turn_token_id if config.end_of_turn_token_id is not None else generation.eos_token_id
    end_of_turn = () if turn is None else (turn,) if isinstance(turn, int) else tuple(turn)
    others = [generation.bos_token_id, generation.pad_token_id, *named.values()]
    special = {number for number in others if isinstance(number, int)} | set(end_of_turn) | set(vision_end)
    return SpecialIds(vision_end, end_of_turn, tuple(sorted(special)))


def read_ids(ids: SpecialIds, chat: ChatFormat | None) -> list[int]:
    """Every id by which a question is found; of the others it only counts that they are text."""
    return [*dict.fromkeys([*ids.vision_end, *ids.end_of_turn, *ids.special, *(sorted(chat.ids) if chat else ())])]


def find_question(
    input_ids: Tensor, visual: Tensor, real: Tensor, ids: SpecialIds, chat: ChatFormat | None = None, own: bool = False
) -> Question:
    """Which tokens vote.

    Args:
        input_ids: [B, S] int64 on the host; -1 where an id is not known.
        visual: [B, S] bool.
        real: [B, S] bool: what is not padding.
        chat: what the chat template puts around a user's text; None: the ids alone say it.
        own: every image has a question of its own, the text of its turn.
    """
    rows = [
        RowTurns(row, seen & there, there, ids, chat)
        for row, seen, there in zip(input_ids.numpy(), visual.numpy(), real.numpy(), strict=True)
    ]
    rule = [row.rule for row in rows]
    groups = [row.own() if own else [(*row.newest(), None)] for row in rows]
    source = [group[-1][1] for group in groups]
    most = max(map(len, groups), default=1)
    mask = np.zeros((len(rows), most, input_ids.shape[1]), bool)
    images = np.zeros_like(mask)
    for row, group in enumerate(groups):
        for place, (text, _, seen) in enumerate(group):
            mask[row, place] = text
            if seen is not None:
                images[row, place] = seen
    if most == 1:
        return Question(torch.from_numpy(mask[:, 0]), None, source, rule)
    return Question(torch.from_numpy(mask), torch.from_numpy(images), source, rule)


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
        self.texts = [self.text(turn) for turn in self.turns]
        self.spoken = [number for number, (text, _) in enumerate(self.texts) if len(text)]

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
        """Which places of a turn stand in short gaps between visual tokens."""
        if len(shown) < 2:
            return np.zeros(len(here), bool)
        behind = np.searchsorted(shown, here)
        inside = (behind > 0) & (behind < len(shown))
        gap = shown[np.minimum(behind, len(shown) - 1)] - shown[np.maximum(behind - 1, 0)] - 1
        return inside & (gap <= STRUCTURE)

    def newest(self) -> tuple[Mask, QuerySource]:
        """The newest user's text that is not empty."""
        return self.turn_or_any(len(self.turns) - 1)

    def turn_or_any(self, turn: int) -> tuple[Mask, QuerySource]:
        """The text of a turn; else of the last one before it that has any, else of the first one behind it."""
        if not self.spoken:
            anything = np.flatnonzero(self.plain if self.plain.any() else ~self.visual)
            return self.spread(anything), QuerySource.ANY_TEXT
        before = [number for number in self.spoken if number <= turn]
        chosen = before[-1] if before else self.spoken[0]
        text, source = self.texts[chosen]
        return self.spread(text), source if chosen == turn else QuerySource.EARLIER_TURN

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


def given_question(input_ids: Tensor, visual: Tensor, real: Tensor, mask: Tensor) -> Question:
    """The question that a call gives as a mask [B, S]; visual tokens and padding in it do not vote.

    Raises:
        InputError: a row with visual tokens of which the mask holds no text.
    """
    chosen = (mask != 0) & real & ~visual
    for row, (some, seen) in enumerate(zip(chosen.any(1).tolist(), visual.any(1).tolist(), strict=True)):
        if seen and not some:
            raise InputError(
                "question_mask must hold at least one text token of every row with images, and holds none of row "
                f"{row}: mark the question's tokens, or leave it out"
            )
    rows = len(input_ids)
    return Question(chosen, None, [QuerySource.GIVEN] * rows, [QuestionRule.GIVEN] * rows)


def mask_of_ids(input_ids: Tensor, real: Tensor, wanted: Any, ids: SpecialIds) -> Tensor:
    """[B, S] bool: the last place in each row where the ids of its question stand.

    Args:
        wanted: [B, T], or a list of ids for each row; special ids at its ends (padding, a start id) and negative ones
            do not count.

    Raises:
        InputError: another number of rows, or a question that is not in its row.
    """
    questions = list(id_lists(wanted, ids.special))
    if len(questions) != len(input_ids):
        raise InputError(
            f"question_ids must hold one list of ids for each of the {len(input_ids)} rows, got {len(questions)}"
        )
    mask = np.zeros(input_ids.shape, bool)
    for row, (line, there, question) in enumerate(zip(input_ids.numpy(), real.numpy(), questions, strict=True)):
        place = np.flatnonzero(there)
        starts = places(line[place], question)
        if not len(starts):
            raise InputError(
                f"question_ids of row {row}, {question}, does not stand in that row: give the ids as they are in "
                "input_ids (a tokenizer may join a word with what stands before it), or question_mask"
            )
        mask[row, place[starts[-1] : starts[-1] + len(question)]] = True
    return torch.from_numpy(mask)


def id_lists(wanted: Any, special: Sequence[int]) -> Iterator[list[int]]:
    """The ids of each row's question, without padding around them."""
    try:
        rows = [torch.as_tensor(row, dtype=torch.int64).tolist() for row in wanted]
    except (TypeError, ValueError, RuntimeError):  # what torch raises at no numbers, or at a single one
        rows = None
    if rows is None or any(not isinstance(row, list) or any(isinstance(each, list) for each in row) for row in rows):
        shape = f" {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else ""
        raise InputError(
            f"question_ids must be [B, T] or a list of ids for each row, got {type(wanted).__name__}{shape}: give the "
            "ids of each row's question as they stand in input_ids"
        )
    for ids in rows:
        text = [place for place, each in enumerate(ids) if each >= 0 and each not in special]
        yield ids[text[0] : text[-1] + 1] if text else []


def counted(question_mask: Tensor, query: str) -> Tensor:
    """[..., S] bool: of the question, what counts: for "last" its last token, else all of it."""
    if query != "last":
        return question_mask
    count = question_mask.long().cumsum(-1)
    return question_mask & (count == count[..., -1:])


def is_any(input_ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """Where any of the wanted ids stands."""
    there = torch.zeros_like(input_ids, dtype=torch.bool)
    for number in wanted:
        there = there | (input_ids == number)
    return there
