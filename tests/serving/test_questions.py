"""Whose text votes on an item, in a prompt that holds one placeholder for each."""

from __future__ import annotations

from hawk_compile.plan.ids import SpecialIds
from hawk_compile.serving.questions import Reader

END, IMAGE, START, STOP, USER, ASSISTANT = 3, 6, 4, 5, 9, 10
IDS = SpecialIds(vision_end=(STOP,), end_of_turn=(END,), special=(START, STOP, IMAGE, END, 2))
ONE = [2, USER, START, IMAGE, STOP, 11, 12, END, 2, ASSISTANT]
TWO = [*ONE, 20, END, 2, USER, START, IMAGE, STOP, 13, END, 2, ASSISTANT]


def spans(prompt: list[int]) -> list[tuple[int, int]]:
    return [(place, place + 1) for place, number in enumerate(prompt) if number == IMAGE]


def asked(prompt: list[int], own: bool = True, query: str = "mean") -> list[tuple[int, ...]]:
    return Reader(IDS, None, own, query).questions(prompt, spans(prompt))


def test_the_text_behind_an_image_votes_on_it() -> None:
    assert asked(ONE) == [(11, 12)]


def test_each_image_by_its_own_turn() -> None:
    assert asked(TWO) == [(11, 12), (13,)]
    assert asked(TWO[:10]) == [(11, 12)], "what is asked later changes nothing about an earlier image"


def test_or_all_by_the_newest_question() -> None:
    assert asked(TWO, own=False) == [(13,), (13,)]


def test_the_last_token_alone() -> None:
    assert asked(TWO, query="last") == [(12,), (13,)]


def test_several_ids_that_stand_for_one_item() -> None:
    """As a checkpoint has it whose placeholder is a word of text."""
    prompt = [2, USER, 30, 31, 30, 11, 12, END, 2, ASSISTANT]
    assert Reader(IDS, None, True, "mean").questions(prompt, [(2, 5)]) == [(11, 12)]


def test_no_text_and_no_items() -> None:
    assert asked([IMAGE]) == [()]
    assert asked([2, USER, 11, END]) == []
