"""docs/habits.md: what it says of refusals stands in the source."""

from __future__ import annotations

import re
from pathlib import Path

from tests.messages import is_message_start

PAGE = Path(__file__).parents[1] / "docs/habits.md"
HEADINGS = ("what you do", "what happens", "how, or the message and why")
SHORTEST = 12
"""Characters of a quoted beginning beside the values in it: fewer would be found in any message."""


def rows() -> list[tuple[str, str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]
    assert all(len(row) == len(HEADINGS) for row in cells), [row for row in cells if len(row) != len(HEADINGS)]
    return [row for row in cells if row != HEADINGS and not set(row[0]) <= set("- ")]  # type: ignore[misc]


def test_every_habit_works_or_is_refused() -> None:
    undecided = [row for row in rows() if not row[1].startswith(("works", "refused"))]
    assert len(rows()) > 30 and not undecided


def test_every_refusal_quotes_a_message_of_the_source() -> None:
    refused = [row for row in rows() if row[1].startswith("refused")]
    quoted = [(row, re.match(r"`([^`]+)`", row[2])) for row in refused]
    assert [row for row, quote in quoted if quote is None] == []
    starts = [quote[1] for _, quote in quoted if quote]
    assert [start for start in starts if len(start.replace("...", "")) < SHORTEST or not is_message_start(start)] == []


def test_a_text_that_no_message_begins_with_is_seen() -> None:
    assert is_message_start("attention_mask must have shape [B, S]") and not is_message_start("the prompt was cut by")
