"""Which refusals a drawn case may meet: what their message says, and of which cases it is right.

Any other HawkError is a finding, as a wrong selection is: it refuses what is valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Case = dict[str, Any]


def seen_later(case: Case) -> bool:
    """Whether a later turn brings images."""
    return any(turn.get("images") for turn in case["call"].get("turns", ()))


def filmed(case: Case) -> bool:
    return any(turn.get("video") for row in case["call"]["rows"] for turn in row["turns"])


def per_image(case: Case) -> bool:
    call = case["call"]
    return bool(call.get("min_per_image")) or "image" in (call.get("quota"), call.get("normalize_per"))


LEGITIMATE: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (r"new images on a cache that already holds tokens", seen_later),
)
"""(what the message begins with, of which cases it is right)."""


def name_of(error: Exception, case: Case) -> str | None:
    """What a legitimate refusal is counted as; None for one that is none."""
    text = str(error)
    for pattern, right in LEGITIMATE:
        if re.search(pattern, text) and right(case):
            return f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', text)[:160]}"
    return None
