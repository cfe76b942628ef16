"""Selectors that may be exported, in ONNX Runtime; the others are refused by name.

That a whole export keeps the tokens of its selector follows: a ranking is one part of the prefill, and the rest is the
same for all of them.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hawk_compile
from hawk_compile.errors import ConfigError
from hawk_compile.exporting import onnx
from hawk_compile.exporting.components import Component
from hawk_compile.settings.selectors import SELECTORS
from tests import zoo

WIDTH = 64
PORTABLE = {name: each.ranking for name, each in SELECTORS.items() if each.ranking and each.portable}


class Rankings(nn.Module):
    """Every ranking that may be exported, of one prompt."""

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return {
            name: ranking(**{each: given[each] for each in inspect.signature(ranking).parameters if each in given})
            for name, ranking in PORTABLE.items()
        }


def prompt(rows: int, length: int, visual: int, votes: int) -> dict[str, Tensor]:
    """What rankings read: a text token, visual tokens, text of which the last tokens vote."""
    generator = torch.Generator().manual_seed(length)
    position = torch.arange(length).expand(rows, -1)
    return {
        "scores": torch.rand(rows, length, generator=generator),
        "embeddings": torch.randn(rows, length, WIDTH, generator=generator),
        "visual_mask": (position >= 1) & (position <= visual),
        "question_mask": position >= length - votes,
        "budget": torch.full((rows,), max(1, visual // 3)),
    }


def test_rankings_are_those_of_pytorch(tmp_path: Path) -> None:
    """At other sizes than at export, fewer tokens than `dart` has pivots among them."""
    sample = prompt(rows=2, length=30, visual=20, votes=6)
    shapes = {name: ("batch", "prompt", *each.shape[2:])[: each.ndim] for name, each in sample.items()}
    files, _ = onnx.write(Component("rankings", Rankings(), sample, shapes), tmp_path, onnx.Options())
    run = onnx.open_session(tmp_path, files[0], None)
    assert {"dart", "qapruner", "norm", "stride"} <= PORTABLE.keys()
    for given in (prompt(1, 90, 70, 9), prompt(3, 47, 40, 2), prompt(2, 3, 1, 1)):
        found, wanted = run(given), Rankings()(**given)
        visual = given["visual_mask"]
        for name in PORTABLE:
            ranks = found[name][visual], wanted[name][visual]
            torch.testing.assert_close(*ranks, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("selector", [name for name, each in SELECTORS.items() if not each.portable])
def test_what_cannot_be_exported_is_refused(tmp_path: Path, selector: str) -> None:
    with pytest.raises(ConfigError, match=f'selector "{selector}" cannot be exported: .* export another one'):
        hawk_compile.export(zoo.build("llava", layers=1), {}, tmp_path / "out", selector=selector)
    assert not list(tmp_path.iterdir())
