"""Metrics by examples, and resampling against what is known of simple cases."""

import math

import numpy as np
import pytest

from hawk_compile.tools.evaluation.metrics import METRICS
from hawk_compile.tools.evaluation.statistics import difference, holm, interval


@pytest.mark.parametrize(
    ("metric", "said", "answers", "expected"),
    [
        ("exact_match", " A  Cat. ", ("dog", "a cat"), 1.0),
        ("exact_match", "cat", ("a cat",), 0.0),
        ("anls", "kitten", ("sitting",), 1 - 3 / 7),
        ("anls", "abc", ("xyz", "q"), 0.0),
        ("anls", "", ("",), 1.0),
        ("relaxed_accuracy", "104", ("100",), 1.0),
        ("relaxed_accuracy", "106", ("100",), 0.0),
        ("relaxed_accuracy", "1,000%", ("1000",), 1.0),
        ("relaxed_accuracy", "nan", ("5",), 0.0),
        ("relaxed_accuracy", "blue", ("Blue",), 1.0),
    ],
)
def test_metrics(metric, said, answers, expected):
    assert METRICS[metric](said, answers) == pytest.approx(expected)


def test_the_interval_of_a_share():
    """That of a binomial share: 1.96 standard errors to either side."""
    scores = np.repeat([1.0, 0.0], [700, 300])
    found = interval(scores)
    error = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert found.mean == 0.7
    assert found.low == pytest.approx(0.7 - error, abs=2e-3) and found.high == pytest.approx(0.7 + error, abs=2e-3)
    assert interval(scores) == found  # the same seed
    assert interval(np.ones(5)) == type(found)(1.0, 1.0, 1.0)


def test_differences_are_paired():
    """Twelve questions won and none lost: by random signs, 2 in 2 ** 12 are as large."""
    baseline = np.repeat([0.0, 1.0], [500, 500])
    better = baseline.copy()
    better[:12] = 1
    found, p = difference(better, baseline)
    assert found.mean == pytest.approx(0.012) and 0 < found.low < found.mean < found.high
    assert p == pytest.approx(2 / 2**12, abs=1e-3)
    mixed = baseline.copy()
    mixed[:6], mixed[500:506] = 1, 0  # six won, six lost
    found, p = difference(mixed, baseline)
    assert found.mean == 0 and p == 1
    assert difference(baseline, baseline)[1] == 1


def test_correction_for_several_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
