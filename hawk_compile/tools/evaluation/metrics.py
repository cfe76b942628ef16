"""How right an answer is, in [0, 1]. A metric of one's own is a function of the same form."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.tools.evaluation.sample import Sample

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


def metric_of(metric: "str | Metric", *others: str) -> Metric:
    """A metric by name; `others` are names that the caller takes beside those here."""
    if callable(metric):
        return metric
    if not isinstance(metric, str) or metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join((*METRICS, *others))} or a function, got {metric!r}")
    return METRICS[metric]


def name_of(metric: "str | Metric") -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def checked(score: float, sample: Sample, skip_bad: bool) -> float:
    """The score of an answer; to be skipped, NaN."""
    if isinstance(score, (int, float, np.number)) and 0 <= score <= 1:  # which NaN is not
        return float(score)
    if skip_bad:
        return math.nan
    raise InputError(
        f"{sample.origin}: the metric must give a number in [0, 1], got {score!r}: mend the metric, or skip what it "
        "fails on (skip_bad, --skip-bad)"
    )


def scored(table: np.ndarray, samples: Sequence[Sample], warn: Callable[[str], None]) -> np.ndarray:
    """[N] bool: the samples that every line of a table of scores [..., N] has a score for.

    Raises:
        InputError: there is none.
    """
    sound = ~np.isnan(table).any(0)
    for sample, good in zip(samples, sound, strict=True):
        if not good:
            warn(f"skipped: {sample.origin}: the metric gives no number in [0, 1]")
    if not sound.any():
        raise InputError("the metric gives a number in [0, 1] for no sample in all its answers: mend the metric")
    return sound


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
