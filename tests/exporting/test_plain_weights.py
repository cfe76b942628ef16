"""Weights that are no plain tensors, as quantised ones: refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hawk_compile
from hawk_compile.errors import ExportError
from tests import zoo
from tests.rounded import round_weights

NAME = "qwen2_5_vl"


@pytest.mark.parametrize("format", ["onnx", "aoti"])
def test_weights_that_are_no_plain_tensors_are_not_exported(format: str, tmp_path: Path) -> None:
    model: Any = zoo.build(NAME, layers=1)
    round_weights(model.base_model.get_decoder())
    inputs = zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[4]])
    with pytest.raises(ExportError, match=r"q_proj\.weight is a Rounded of float32, and an export takes plain"):
        hawk_compile.export(model, inputs, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())
