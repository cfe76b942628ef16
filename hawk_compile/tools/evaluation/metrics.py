"""How right an answer is, in [0, 1]. A metric of one's own is a function of the same form."""

import math
import re
from collections.abc import Callable

Metric = Callable[[str, tuple[str, ...]], float]
"""(what the model said, all right answers) -> [0, 1]."""

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def exact_match(said: str, answers: tuple[str, ...]) -> float:
    """1 if an answer was given, apart from capitals, spaces and a full stop."""
    return float(any(plain(said) == plain(answer) for answer in answers))


def anls(said: str, answers: tuple[str, ...]) -> float:
    """Average normalised Levenshtein similarity of the nearest answer, 0 below a half (DocVQA, arXiv 1907.00490)."""
    found = max(similarity(plain(said), plain(answer)) for answer in answers)
    return found if found >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(said: str, answers: tuple[str, ...]) -> float:
    """Exact match; numbers may be off by 5 % (ChartQA, arXiv 2203.10244)."""
    if exact_match(said, answers):
        return 1.0
    value = number(said)
    wanted = [each for each in map(number, answers) if each is not None]
    return float(value is not None and any(abs(value - each) <= RELAXED_TOLERANCE * abs(each) for each in wanted))


METRICS: dict[str, Metric] = {"exact_match": exact_match, "anls": anls, "relaxed_accuracy": relaxed_accuracy}


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().rstrip(".").strip().casefold())


def number(text: str) -> float | None:
    """The number that a text is, a percentage as it stands; None if it is none."""
    try:
        value = float(text.strip().rstrip(".%").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def similarity(left: str, right: str) -> float:
    """1 - edit distance / length of the longer text."""
    longer = max(len(left), len(right))
    if not longer:
        return 1.0
    row = list(range(len(right) + 1))
    for i, one in enumerate(left, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(right, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return 1 - row[-1] / longer
