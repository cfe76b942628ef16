"""A few drawn prompts at every run of the tests, more in the slow ones, and faults that these must find."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hawk_compile.errors import UnsupportedCallError
from tests.fuzz.controls import CONTROLS
from tests.fuzz.holding import Wrong, hold
from tests.fuzz.refusals import name_of
from tests.fuzz.running import Tally, round_of, run

LLAVA = {"name": "llava", "layers": 1, "rows": 3, "calls": []}


def drawn(made: dict[str, Any], calls: int, small: bool = False) -> Tally:
    tally = Tally()
    round_of(0, made, calls, tally, math.inf, small)
    return tally


def test_a_few_prompts_are_as_by_hand_and_a_fault_is_found() -> None:
    tally = drawn(LLAVA, 12)
    assert not tally.found, tally.found
    assert tally.prompts > 12
    with CONTROLS["flipped"]():
        assert drawn(LLAVA, 12).found


def test_a_refusal_is_legitimate_where_it_is_true_alone() -> None:
    """Images of a later turn are taken by models in which they attend one way."""
    later = {"turns": [{"images": [[2, 2]]}]}
    error = UnsupportedCallError("new images on a cache that already holds tokens cannot attend both ways (...)")
    assert name_of(error, {"model": {"name": "gemma3"}, "call": later}) is not None
    for name, call in (("qwen2_5_vl", later), ("llava", later), ("gemma3", {"turns": [{"after": 2}]})):
        assert name_of(error, {"model": {"name": name}, "call": call}) is None
    two_kinds = UnsupportedCallError("image and video in one call: this model adds features of both to later layers")
    for name, turn, right in (
        ("qwen3_vl", {"images": [[2, 2]], "video": [2, 2, 2]}, True), ("qwen3_vl", {"video": [2, 2, 2]}, False),
        ("qwen2_5_vl", {"images": [[2, 2]], "video": [2, 2, 2]}, False),
    ):  # fmt: skip
        case = {"model": {"name": name}, "call": {"rows": [{"turns": [turn]}]}}
        assert (name_of(two_kinds, case) is not None) == right
    other = UnsupportedCallError("new images on a cache that already holds tokens need position_ids")
    behind = UnsupportedCallError(f"of {error}")
    assert [name_of(each, {"model": {"name": "gemma3"}, "call": later}) for each in (other, behind)] == [None, None]


@pytest.mark.slow
def test_a_minute_of_prompts() -> None:
    tally = run(60, 100, calls=60)
    assert not tally.found, tally.found
    assert tally.prompts > 100


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
def test_a_fault_is_found(control: str) -> None:
    """Each by calls that are right without it."""
    with CONTROLS[control]():
        found = drawn({"name": "qwen2_5_vl", "layers": 1, "rows": 3, "calls": []}, 60).found
    assert found
    hold(found[0][1])
    with CONTROLS[control](), pytest.raises(Wrong):
        hold(found[0][1])
