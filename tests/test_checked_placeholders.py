"""Models whose checks of placeholders, positions or layers stood in the way of one graph, each by what is special."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hawk_compile
from hawk_compile.tools.survey.checks import Check, at_ratio_zero, batches, settings, steps
from hawk_compile.tools.survey.tiny import build, prompt, read

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


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_visual_tokens_that_are_masked_out(name: str, ratio: float) -> None:
    """They take no part, features of later layers neither: as in the plain model with what was removed masked out."""
    tiny = read(FOLDER / f"{name}.json")
    model, inputs = build(tiny), prompt(tiny, rows=2)
    rows, length = inputs["input_ids"].shape
    places = torch.arange(length).repeat(rows, 1)
    mask = torch.ones_like(places)
    mask[0, :4] = 0
    inputs |= {"attention_mask": mask, "position_ids": places.expand(3, -1, -1) if name == "qwen3_vl" else places}
    hawk_compile.optimize(model, **settings(tiny, ratio))
    with torch.no_grad():
        logits = model(**inputs).logits
        report = hawk_compile.report(model)
        hawk_compile.restore(model)
        kept = torch.stack([torch.isin(places[0], keep) for keep in report.keep_indices])
        expected = model(**{**inputs, "attention_mask": mask * kept}).logits
    assert report.kept_visual_tokens.lt(report.visual_tokens).all() == (ratio > 0)
    for row, keep in enumerate(report.keep_indices):
        torch.testing.assert_close(logits[row, -len(keep) :], expected[row, keep], atol=2e-5, rtol=1e-5)
