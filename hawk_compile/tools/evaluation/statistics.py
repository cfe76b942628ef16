"""Intervals and significance of scores measured on the same samples.

All by resampling, with a seed: nothing is assumed of how scores are distributed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 10_000
LEVEL = 0.95
CHUNK = 2_000_000
"""Random numbers held at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds that hold it in 95 % of resamplings."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean of values [N] with its percentile bootstrap interval."""
    count = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty(ROUNDS)
    # How often each sample is drawn: equal values are counted together, so 0/1 scores need two numbers a round.
    distinct, places = np.unique(values, return_inverse=True)
    shares = np.bincount(places) / count
    step = max(1, CHUNK // max(1, len(distinct)))
    for start in range(0, ROUNDS, step):
        stop = min(ROUNDS, start + step)
        means[start:stop] = generator.multinomial(count, shares, stop - start) @ distinct / count
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def difference(values: np.ndarray, baseline: np.ndarray, seed: int = 0) -> tuple[Interval, float]:
    """values - baseline [N], sample by sample: the mean with its interval, and the p-value of a sign-flip test.

    The p-value is the share of random signs under which the mean difference is as large; 2-sided, never 0.
    """
    gaps = values - baseline
    found = interval(gaps, seed)
    changed = gaps[gaps != 0]
    if not len(changed):
        return found, 1.0
    generator = np.random.default_rng(seed)
    as_large = 0
    step = max(1, CHUNK // len(changed))
    for start in range(0, ROUNDS, step):
        signs = generator.integers(0, 2, (min(ROUNDS, start + step) - start, len(changed))) * 2 - 1
        as_large += int((np.abs(signs @ changed) >= abs(changed.sum()) - 1e-9).sum())
    return found, (as_large + 1) / (ROUNDS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for having been tested together (Holm, 1979)."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()
