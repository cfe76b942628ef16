"""Quantised models: pruned like others, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile.errors import UnsupportedModelError
from tests import zoo
from tests.runtime.models import ROUNDING, generate, new_tokens
from tests.runtime.reference import Conversation

NAME, RATIO = "qwen2_5_vl", 0.6


def torchao(model: Any, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    quantization.quantize_(model.base_model.get_decoder(), getattr(quantization, config)())


def quanto(model: Any, kind: str) -> None:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    library.quantize(model.base_model.get_decoder(), weights=getattr(library, kind))
    library.freeze(model.base_model.get_decoder())


def prompt(model: Any) -> dict[str, Any]:
    return zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[4]])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("quantise", "kind"), [
    (torchao, "Int8WeightOnlyConfig"),
    pytest.param(torchao, "Int8DynamicActivationInt8WeightConfig", marks=SLOW),
    pytest.param(torchao, "Float8WeightOnlyConfig", marks=SLOW),
    pytest.param(quanto, "qint8", marks=SLOW),
    pytest.param(quanto, "qfloat8", marks=SLOW),
])  # fmt: skip
def test_quantised_after_optimize_it_answers_as_the_quantised_model_on_kept_tokens(quantise: Any, kind: str) -> None:
    """And nothing of what was compiled before that is used again."""
    model, alone = zoo.build(NAME, layers=2), zoo.build(NAME, layers=2)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    inputs = prompt(model)
    before = generate(model, inputs, tokens=1).logits[0]
    quantise(model, kind)
    quantise(alone, kind)
    loop = Conversation(alone, RATIO)
    loop.prompt(inputs)
    out = generate(model, inputs, tokens=4)
    assert hawk_compile.report(model).keep_indices[0].tolist() == loop.keep.tolist()
    torch.testing.assert_close(out.logits[0][0], loop.logits[-1], **ROUNDING)
    assert new_tokens(out, inputs) == loop.greedy(4)
    assert not torch.allclose(out.logits[0], before, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["uniform", "hawk_each", "fastv", "idpruner", "qapruner", "norm", "stride"])
def test_selectors_keep_as_many_of_a_padded_batch(selector: str) -> None:
    """Each row as if it were alone."""
    model = zoo.build(NAME, layers=2)
    torchao(model, "Int8WeightOnlyConfig")
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", selector=selector)
    sizes = zoo.sizes(NAME)
    generate(model, zoo.inputs(NAME, model, rows=[sizes[4], sizes[2]]), tokens=1)
    report = hawk_compile.report(model)
    kept = report.kept_visual_tokens.tolist()
    assert kept == [-(-zoo.visual_count(NAME, size) * 4 // 10) for size in (sizes[4], sizes[2])]


def test_layers_of_torchs_own_quantisation_are_refused_and_nothing_is_changed() -> None:
    model: Any = zoo.build(NAME, layers=1)
    torch.ao.quantization.quantize_dynamic(model.base_model.get_decoder(), {torch.nn.Linear}, inplace=True)
    before = dict(vars(model))
    with pytest.raises(UnsupportedModelError, match=r"q_proj is a layer of torch\.ao\.quantization .*Int8WeightOnly"):
        hawk_compile.optimize(model, ratio=RATIO)
    assert vars(model) == before
