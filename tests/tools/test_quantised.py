"""What measures and inspects a model, of one that is quantised: as of the plain model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

import hawk_compile
from tests.exporting import demo

pytestmark = pytest.mark.slow
SETTINGS = {"backend": "eager", "batch": 3}


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    model = demo.fresh()
    quantization.quantize_(model.base_model.get_decoder(), quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return demo.fresh(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def plain_weight(layer: torch.nn.Linear) -> torch.Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.dequantize()
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, state)


def plain_twin(quantised: Any) -> Any:
    """The shipped model with the weights that the quantised one stands for."""
    model = demo.fresh()
    changed = 0
    for name, layer in quantised.named_modules():
        if isinstance(layer, torch.nn.Linear) and type(layer.weight) is not torch.nn.Parameter:
            twin = model.get_submodule(name)
            weight = plain_weight(layer).reshape(twin.weight.shape)
            changed += not torch.equal(weight, twin.weight)
            twin.weight = torch.nn.Parameter(weight.to(torch.float32))
    assert changed
    return model


@pytest.mark.parametrize("load", [torchao, bitsandbytes])
def test_calibration_finds_the_same_weights_of_heads(load: Any) -> None:
    model = load()
    measured = [
        hawk_compile.calibrate(
            each, demo.processor(), "demo:calibration", limit=6, metric="likelihood", ratios=(0.9,), **SETTINGS
        )
        for each in (model, plain_twin(model))
    ]
    assert measured[0].weights == pytest.approx(measured[1].weights, abs=1e-3)
    assert len(set(measured[0].weights)) > 1


@pytest.mark.parametrize("load", [torchao, bitsandbytes])
def test_evaluation_finds_the_same_answers_and_inspection_the_same_model(load: Any) -> None:
    model = load()
    twin = plain_twin(model)
    reports = [
        hawk_compile.evaluate(
            each, demo.processor(), "demo:tune", ratios=(0.8,), selectors=("hawk", "hawk_diverse"), limit=12,
            max_new_tokens=2, **SETTINGS,
        )
        for each in (model, twin)
    ]  # fmt: skip
    for row, expected in zip(*(report.rows for report in reports), strict=True):
        assert (row.method, row.kept) == (expected.method, expected.kept)
        assert row.scores.tolist() == expected.scores.tolist()
    assert hawk_compile.inspect(model) == hawk_compile.inspect(twin)
