"""One tiny model of each kind, exported once from one prompt and run at three shapes that it was not exported from."""

from __future__ import annotations

from pathlib import Path

import pytest

import hawk_compile
from hawk_compile.exporting.check import compare
from tests import zoo

NAMES = ("qwen3_vl",)
"""Features for later layers, and packed patches. `benchmarks/export.py architectures` does the same for others and in
every format; Qwen2.5-VL is the shipped model's architecture, see test_formats.py."""


@pytest.mark.parametrize("name", NAMES)
def test_an_export_of_one_prompt_runs_at_others(name: str, tmp_path: Path) -> None:
    """A batch of one, of two with several images, and of three that differ; ids, kept tokens and logits of PyTorch."""
    model = zoo.build(name, layers=2 if name == "qwen3_vl" else 1)  # two kinds of layers there
    sizes = zoo.sizes(name)
    hawk_compile.export(model, zoo.inputs(name, model, rows=[sizes[1]]), tmp_path / name, ratio=0.6)
    batches = ([sizes[2]], [sizes[3], sizes[6]], [sizes[0], sizes[4], sizes[5]])
    prompts = [zoo.inputs(name, model, rows=rows) for rows in batches]
    found = compare(hawk_compile.load(tmp_path / name), model, prompts, max_new_tokens=4)
    assert found.whole and found.rows == 6, found
    assert found.logits < 1e-4
