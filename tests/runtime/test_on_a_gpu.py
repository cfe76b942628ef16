"""What only a GPU can show: a model that moves to it and back, and one that is split between it and the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

import hawk_compile
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.tools.survey.oracle import pruned_forward
from tests import zoo
from tests.runtime.models import RATIO, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAME = "qwen2_5_vl"
ROUNDING = {"atol": 2e-4, "rtol": 1e-4}
"""Logits of magnitude 1 to 10 in fp32, of other libraries' matrix products (TF32 is off)."""


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 is fp32: TF32 keeps ten bits of a factor, which changes who is kept among near ties."""
    for library in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(library, "allow_tf32", False)
    yield


def picture(model: PreTrainedModel) -> dict[str, Tensor]:
    return zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[4]])


@torch.no_grad()
def prefill(model: PreTrainedModel) -> tuple[list[int], Tensor]:
    """Kept positions, and the logits on the CPU."""
    out = model(**picture(model))
    return hawk_compile.report(out).keep_indices[0].tolist(), out.logits.cpu()


def test_a_model_moves_after_optimize() -> None:
    model = hawk_compile.optimize(zoo.build(NAME), ratio=RATIO, backend="eager")
    kept, logits = prefill(model)
    tokens = generate(model, picture(model)).sequences
    for device in ("cuda", "cpu"):
        model.to(device)
        kept_there, logits_there = prefill(model)
        assert kept_there == kept
        torch.testing.assert_close(logits_there, logits, **ROUNDING)
        assert torch.equal(generate(model, picture(model)).sequences.cpu(), tokens)


def test_an_encoder_on_the_cpu_and_a_decoder_on_the_gpu() -> None:
    split = dispatch_model(
        zoo.build(NAME), {"model.visual": "cpu", "model.language_model": 0, "lm_head": 0}, main_device=0
    )
    kept, logits = prefill(hawk_compile.optimize(split, ratio=RATIO, backend="eager"))
    plain = zoo.build(NAME).to("cuda")
    inputs = picture(plain)
    keep = torch.tensor(kept, device="cuda")
    expected, _ = pruned_forward(plain, inputs, keep, zoo.visual_mask(NAME, plain, inputs)[0])
    assert len(kept) < inputs["input_ids"].shape[1]
    torch.testing.assert_close(logits[0, -1], expected.logits[0, -1].cpu(), **ROUNDING)


def test_a_decoder_on_two_devices_is_refused() -> None:
    on_gpu = ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")
    decoder = {f"model.language_model.{name}": 0 for name in on_gpu}
    split = dispatch_model(
        zoo.build(NAME), {"model.visual": 0, "lm_head": 0, **decoder, "model.language_model.layers.1": "cpu"},
        main_device=0,
    )
    with pytest.raises(UnsupportedModelError, match="text decoder"):
        hawk_compile.optimize(split, ratio=RATIO)
