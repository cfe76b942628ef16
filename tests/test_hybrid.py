"""Decoders of which some layers keep states in place of keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawk_compile.tools.survey.checks import batches, prefill, steps
from hawk_compile.tools.survey.tiny import Tiny, build, read

FOLDER = Path(__file__).parent / "architectures"
ORDERS = {"qwen3_5": 0, "qwen3_5.linear_first": 3, "lfm2_vl": 0}
"""Tiny models -> the layer that scores."""


def tiny(name: str) -> Tiny:
    return read(FOLDER / f"{name}.json")


@pytest.mark.parametrize("name", ["qwen3_5.linear_first"])
@pytest.mark.parametrize("check", [prefill, steps, batches])
def test_a_hybrid_equals_the_plain_model_gathered_in_front_of_the_layer_that_scores(name, check) -> None:
    """Prefill bit for bit, decode steps and rows of a padded batch but for rounding."""
    check(tiny(name), build(tiny(name)))
