"""Models whose checks of placeholders, positions or layers stood in the way of one graph, each by what is special."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawk_compile.tools.survey.checks import Check, at_ratio_zero, batches, steps
from hawk_compile.tools.survey.tiny import build, read

FOLDER = Path(__file__).parent / "architectures"
SLOW = (
    "granite_docling",  # features of three dimensions, of which the check divides by one size
    "video_llava",  # features that the check flattens
    "gemma4",  # the check in the forward itself; the last layers run over the last position alone
)
CASES = [
    ("exaone4_5", steps),  # a place for position offsets, and positions that count like any other's
    ("hunyuan_vl", steps),  # a check by `if`; four positions a token
    *(pytest.param(name, check, marks=pytest.mark.slow) for name in SLOW for check in (at_ratio_zero, steps, batches)),
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_equals_the_plain_model_on_what_is_kept(name: str, check: Check) -> None:
    tiny = read(FOLDER / f"{name}.json")
    check(tiny, build(tiny))
