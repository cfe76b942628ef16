"""The question that a call gives itself: as a mask, or as the ids of its text."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawk_compile.errors import InputError
from hawk_compile.plan.chat import places
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.question import Question
from hawk_compile.plan.row import QuerySource, QuestionRule


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
            f"question_ids must hold one list of ids for each of the {len(input_ids)} rows, got {len(questions)}: "
            "give one for every row"
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
