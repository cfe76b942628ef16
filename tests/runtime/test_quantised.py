"""Quantised models: pruned like others, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    QuantoConfig,
    TorchAoConfig,
)

import hawk_compile
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.settings.selectors import SELECTORS
from tests import zoo
from tests.runtime.models import ROUNDING, generate, new_tokens, rows_alone
from tests.runtime.reference import Conversation

NAME, RATIO = "qwen2_5_vl", 0.6


def torchao(model: Any, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    quantization.quantize_(model.base_model.get_decoder(), getattr(quantization, config)())


def torchao_int4(model: Any, config: str) -> None:
    """Weights of 4 bits in groups of 16."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    names = ("weight_dtype", "granularity" if config == "IntxWeightOnlyConfig" else "weight_granularity")
    made = getattr(quantization, config)(**dict(zip(names, (torch.int4, quantization.PerGroup(16)), strict=True)))
    quantization.quantize_(model.base_model.get_decoder(), made)


def quanto(model: Any, kind: str, **more: Any) -> None:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    library.quantize(model.base_model.get_decoder(), weights=getattr(library, kind), **more)
    library.freeze(model.base_model.get_decoder())


def saved(folder: Path) -> Callable[..., Any]:
    """What loads a tiny model of one checkpoint, with or without quantisation."""
    zoo.build(NAME, layers=2).save_pretrained(folder)

    def load(**options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()

    return load


def bitsandbytes(folder: Path, kind: str) -> Any:
    """int8, or one of the kinds of 4 bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return saved(folder)(quantization_config=BitsAndBytesConfig(**options))


def by_torchao(folder: Path, kind: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with ExecuTorch alone")
    return saved(folder)(quantization_config=TorchAoConfig(getattr(quantization, kind)()))


def by_quanto(folder: Path, kind: str) -> Any:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return saved(folder)(quantization_config=QuantoConfig(weights=kind))


LARGEST = {"W8A8": 127, "W4A16": 7, "FP8_DYNAMIC": 448}
"""Schemes of compressed-tensors, and what the largest weight of a group or channel becomes."""


def compressed_tensors(folder: Path, scheme: str, dequantize: bool = True) -> Any:
    """A model of a checkpoint of compressed-tensors', its decoder quantised, 4 bits in groups of 32."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor

    asked = quantization.preset_name_to_scheme(scheme, ["Linear"])
    if asked.weights.group_size is not None:
        asked.weights.group_size = 32
    model = zoo.build(NAME, layers=2)
    ignored = ["lm_head", "re:.*visual.*"]
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"all": asked}, ignore=ignored)
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight, scale = module.weight.data, module.weight_scale
            groups = weight.unflatten(-1, (scale.shape[-1], -1))
            scale.data = (groups.abs().amax(-1) / LARGEST[scheme]).clamp(min=1e-6).to(scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    config = CompressedTensorsConfig(dequantize=dequantize)
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    ).eval()


def prompt(model: Any) -> dict[str, Any]:
    return zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[4]])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("quantise", "kind"), [
    (torchao, "Int8WeightOnlyConfig"),
    pytest.param(torchao, "Int8DynamicActivationInt8WeightConfig", marks=SLOW),
    pytest.param(torchao, "Float8WeightOnlyConfig", marks=SLOW),
    pytest.param(torchao_int4, "IntxWeightOnlyConfig", marks=SLOW),
    pytest.param(torchao_int4, "Int8DynamicActivationIntxWeightConfig", marks=SLOW),
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
    assert not torch.allclose(check(model, alone, inputs), before, atol=1e-3)


def check(model: Any, alone: Any, inputs: dict[str, Any]) -> Any:
    """An optimised model keeps and answers what the quantised model does by hand; the logits of its first token."""
    loop = Conversation(alone, RATIO)
    loop.prompt(inputs)
    out = generate(model, inputs, tokens=4)
    assert hawk_compile.report(model).keep_indices[0].tolist() == loop.keep.tolist()
    torch.testing.assert_close(out.logits[0][0], loop.logits[-1], **ROUNDING)
    assert new_tokens(out, inputs) == loop.greedy(4)
    return out.logits[0]


@pytest.mark.slow
@pytest.mark.parametrize(("load", "kind"), [
    *((bitsandbytes, kind) for kind in ("int8", "nf4", "fp4")),
    *((compressed_tensors, scheme) for scheme in LARGEST),
    (by_torchao, "Int8WeightOnlyConfig"), (by_quanto, "int8"),
])  # fmt: skip
def test_loaded_quantised_it_answers_as_the_quantised_model_on_kept_tokens(
    load: Any, kind: str, tmp_path: Path
) -> None:
    """bitsandbytes' layers change in their first call; those of compressed-tensors are dequantised as they are
    loaded."""
    model, alone = load(tmp_path / "model", kind), load(tmp_path / "alone", kind)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    plain = zoo.build(NAME, layers=2)
    with torch.no_grad():
        unquantised = plain(**prompt(plain)).logits[0, -1]
        assert not torch.allclose(alone(**prompt(alone)).logits[0, -1], unquantised, atol=1e-3)
    check(model, alone, prompt(model))


@pytest.mark.slow
def test_weights_that_a_first_call_packs_are_packed_ahead_of_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes does with 4 bits on CPUs with AVX512-BF16. Another product, of the weight as it was, stands for
    theirs, which reads the packed one."""
    model, alone = bitsandbytes(tmp_path, "nf4"), bitsandbytes(tmp_path, "nf4")
    from bitsandbytes import functional, nn

    layers = [  # as it takes them: of whole blocks
        each for each in model.base_model.get_decoder().modules()
        if isinstance(each, nn.Linear4bit) and each.in_features % 64 == 0
    ]
    for each in (*model.modules(), *alone.modules()):
        if isinstance(each, nn.Linear4bit):  # whatever this CPU has
            each.support_avx512bf16_for_cpu = False
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
        layer.weight.quant_state.plain = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    monkeypatch.setattr(functional, "gemv_4bit", lambda x, weight, out, state: x @ state.plain.t() + 0 * weight.sum())
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    check(model, alone, prompt(model))
    assert layers and all(layer.weight.quant_state.packing_format_for_cpu for layer in layers)


def test_layers_that_stay_compressed_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = compressed_tensors(tmp_path, "W8A8", dequantize=False)
    before, held = dict(vars(model)), {name: (each.dtype, each.data_ptr()) for name, each in model.state_dict().items()}
    refused = r"q_proj is quantised by compressed-tensors, .*CompressedTensorsConfig\(dequantize=True\)"
    with pytest.raises(UnsupportedModelError, match=refused):
        hawk_compile.optimize(model, ratio=RATIO)
    assert vars(model) == before
    assert {name: (each.dtype, each.data_ptr()) for name, each in model.state_dict().items()} == held


def test_quantised_activations_are_refused_at_optimize_or_at_the_prompt() -> None:
    """Those of the decoder; an encoder runs ahead of the graph."""
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model: Any = zoo.build(NAME, layers=1)
    library.quantize(model.base_model.visual, weights=library.qint8, activations=library.qint8)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    quanto(model, "qint8", activations=library.qint8)
    refused = pytest.raises(UnsupportedModelError, match=r"q_proj has quantised activations .*\(activations=None\)")
    with refused:
        model(**prompt(model))
    hawk_compile.restore(model)
    with refused:
        hawk_compile.optimize(model, ratio=RATIO)


@pytest.mark.slow
@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_keep_of_a_padded_batch_what_they_keep_of_its_rows(selector: str) -> None:
    """Each row as if it were alone."""
    model = zoo.build(NAME, layers=2)
    torchao(model, "Int8WeightOnlyConfig")
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", selector=selector)
    rows = [zoo.sizes(NAME)[4], zoo.sizes(NAME)[2]]
    batch = zoo.inputs(NAME, model, rows=rows)
    generate(model, batch, tokens=1)
    together = hawk_compile.report(model)
    kept = together.kept_visual_tokens.tolist()
    assert kept == [-(-zoo.visual_count(NAME, size) * 4 // 10) for size in rows]
    for row, single in enumerate(rows_alone(NAME, batch, rows)):
        generate(model, single, tokens=1)
        padding = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
        alone = hawk_compile.report(model).keep_indices[0]
        assert together.keep_indices[row].tolist() == (alone + padding).tolist()


def test_layers_of_torchs_own_quantisation_are_refused_and_nothing_is_changed() -> None:
    model: Any = zoo.build(NAME, layers=1)
    torch.ao.quantization.quantize_dynamic(model.base_model.get_decoder(), {torch.nn.Linear}, inplace=True)
    before = dict(vars(model))
    with pytest.raises(UnsupportedModelError, match=r"q_proj is a layer of torch\.ao\.quantization .*Int8WeightOnly"):
        hawk_compile.optimize(model, ratio=RATIO)
    assert vars(model) == before
