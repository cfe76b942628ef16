"""A few drawn prompts at every run of the tests, more in the slow ones, and faults that these must find."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.fuzz.controls import CONTROLS
from tests.fuzz.holding import Wrong, hold
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
