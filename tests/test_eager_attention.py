"""Decoders that have eager attention alone: the attention that scores is found by its softmax."""

from __future__ import annotations

import pytest

import hawk_compile
from hawk_compile.tools.survey.checks import at_ratio_zero, batches, prefill, steps
from hawk_compile.tools.survey.tiny import build, prompt
from tests.marks import slow
from tests.tiny import tiny

CAPS = "paligemma.gemma2"
"""Caps the logits of its attention, which SDPA cannot."""
SINKS = "inkling2"
"""Sinks, a bias of positions, a convolution over keys, and attention over the outputs of earlier blocks."""


@pytest.mark.parametrize("name", [CAPS, pytest.param(SINKS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "check", [prefill, steps, *slow(at_ratio_zero, batches)]
)
def test_a_decoder_without_sdpa_equals_the_plain_model_gathered(name, check) -> None:
    check(tiny(name), build(tiny(name)))


def test_the_report_says_eager() -> None:
    model = hawk_compile.optimize(build(tiny(CAPS)), ratio=0.5, backend="eager")
    model(**prompt(tiny(CAPS), rows=1))
    report = hawk_compile.report(model)
    assert (report.prefill_attention, report.attention) == ("eager", "eager")
