"""What export refuses before it writes anything, and that a refused export leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hawk_compile
from hawk_compile import Adaptive, HawkConfig
from hawk_compile.errors import ConfigError, ExportError, HeadWeightsError, InputError, UnsupportedModelError
from hawk_compile.exporting import aoti, onnx, openvino
from hawk_compile.exporting.prefill import encoded_prompt
from hawk_compile.exporting.settings import settings_of
from hawk_compile.tools.survey.tiny import build, read
from hawk_compile.tools.survey.tiny import prompt as tiny_prompt
from tests import zoo
from tests.tiny import FOLDER

NAME = "llava"


def prompt() -> dict[str, Any]:
    return zoo.inputs(NAME, zoo.build(NAME, layers=1), rows=[zoo.Row(images=((1, 1),))])


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"format": "tflite"}, ExportError, "must be one of onnx, aoti, openvino, tensorrt, executorch, got 'tflite'"),
    ({"ratio": 1.0}, ConfigError, "ratio is the fraction of visual tokens removed"),
    ({"quantization": "int4"}, ConfigError, "quantization must be one of int8 or None, got 'int4'"),
    ({"rato": 0.5}, ConfigError, "unknown setting rato of format='onnx'; its settings are ratio, .*, quantization"),
    ({"format": "aoti", "quantization": "int8"}, ConfigError, "unknown setting quantization of format='aoti'"),
    ({"backend": "eager"}, ConfigError, "backend='eager' cannot be exported: an export takes ratio, head_weights"),
    ({"config": HawkConfig(quota="image")}, ConfigError, "quota='image' cannot be exported"),
    ({"budget": Adaptive(0.9)}, ConfigError, r"budget=Adaptive\(.*\) cannot be exported"),
    ({"config": HawkConfig(), "ratio": 0.5}, ConfigError, "give either a config or single settings"),
    ({"config": {"ratio": 0.5}}, ConfigError, "config must be a HawkConfig, got dict"),
])  # fmt: skip
def test_settings(tmp_path: Path, settings: dict[str, Any], error: type[Exception], match: str) -> None:
    """Before the model is looked at."""
    with pytest.raises(error, match=match):
        hawk_compile.export(nn.Identity(), {}, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_settings_come_as_a_config_or_by_name() -> None:
    """As for optimize, with the format's own beside either."""
    config = HawkConfig(ratio=0.3, selector="norm", normalization="minmax")
    assert settings_of(onnx, "onnx", config, {"quantization": "int8"}) == (config, onnx.Options("int8"))
    made, options = settings_of(aoti, "aoti", None, {"ratio": 0.3, "selector": "norm"})
    assert (made.ratio, made.selector, options) == (0.3, "norm", None)


def test_head_weights_must_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(HeadWeightsError, match="must be 4 finite numbers"):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), tmp_path / "out", head_weights=[1.0, 2.0])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ExportError, match=r'needs the package openvino.*pip install "hawk-compile\[openvino\]"'):
        hawk_compile.export(nn.Identity(), {}, tmp_path / "out", format="openvino")  # type: ignore[arg-type]


def test_models_and_prompts_that_cannot_be_exported(tmp_path: Path) -> None:
    text: Any = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                             num_attention_heads=2))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="takes no images"):
        hawk_compile.export(text, {}, tmp_path / "out")
    with pytest.raises(InputError, match="inputs must hold input_ids"):
        hawk_compile.export(zoo.build(NAME, layers=1), {"inputs_embeds": torch.ones(1, 4, 64)}, tmp_path / "out")
    pixtral = zoo.build("mistral3", layers=1)
    with pytest.raises(UnsupportedModelError, match="takes image_sizes, which would be fixed in its graph"):
        sizes = zoo.inputs("mistral3", pixtral, rows=[zoo.sizes("mistral3")[1]])
        hawk_compile.export(pixtral, sizes, tmp_path / "out")
    with pytest.raises(InputError, match="inputs must hold a prompt with an image"):
        hawk_compile.export(zoo.build(NAME, layers=1), {"input_ids": torch.ones(1, 4).long()}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "error", "match"), [
    ("minicpmv4_6", UnsupportedModelError, "its encoder's merger gives a list of as many tensors as there are images"),
    ("lfm2_vl", UnsupportedModelError, "its encoder's vision_tower takes spatial_shapes, which would be fixed"),
    ("video_llava", UnsupportedModelError, "runs multi_modal_projector more than once .*give inputs with one mod"),
    ("blip-2", ExportError, "its own generate embeds the prompt and goes on with its language_model"),
    ("minimax_m3_vl", ExportError, "its cache has layers of the kind MiniMaxM3VLSparseCacheLayer"),
    ("ovis2", UnsupportedModelError, r"one component does not take; run the model with hawk_compile\.optimize"),
    ("qwen3_omni_moe_thinker", ExportError, r"has no window \(use_sliding_window=False\), and yet its cache drops all"),
    ("qwen2_audio", ExportError, "it encodes audio in the middle of its forward"),
])  # fmt: skip
def test_types_that_cannot_be_exported(tmp_path: Path, name: str, error: type[Exception], match: str) -> None:
    """Before anything is traced."""
    tiny = read(FOLDER / f"{name}.json")
    settings = {} if tiny.modalities is None else {"modalities": tiny.modalities}
    with pytest.raises(error, match=match):
        hawk_compile.export(build(tiny), tiny_prompt(tiny, rows=1), tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_what_would_stay_whole_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the inputs have image, and modalities=\('video',\) leave that whole"):
        hawk_compile.export(zoo.build("qwen2_5_vl", layers=1), zoo.inputs(
            "qwen2_5_vl", zoo.build("qwen2_5_vl", layers=1), rows=[zoo.sizes("qwen2_5_vl")[0]]
        ), tmp_path / "out", modalities=("video",))  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_types_that_a_runtime_does_not_have(tmp_path: Path, format: str) -> None:
    model = zoo.build(NAME, layers=1).to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"runs models in float32 or float16, got one in bfloat16: give model.float"):
        hawk_compile.export(model, prompt(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_fails_leaves_the_offsets_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("qwen2_5_vl", layers=1)
    inputs = zoo.inputs("qwen2_5_vl", model, rows=[zoo.sizes("qwen2_5_vl")[0]])
    remembered = torch.tensor([[-7]])
    model.base_model.rope_deltas = remembered
    seen = []

    def fails(*args: Any, **kwargs: Any) -> None:
        seen.append(model.base_model.rope_deltas)
        raise MemoryError

    monkeypatch.setattr(model.base_model.visual, "forward", fails)
    with pytest.raises(MemoryError):
        encoded_prompt(model, inputs)
    assert seen[0] is not remembered  # or this would show nothing
    assert model.base_model.rope_deltas is remembered


def test_a_writer_that_fails_leaves_the_model_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(NAME, layers=1).train()
    model.base_model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []

    def fails(*args: Any) -> None:
        seen.append(model.training)
        raise MemoryError

    monkeypatch.setattr(onnx, "write", fails)
    with pytest.raises(ExportError) as caught:
        hawk_compile.export(model, prompt(), tmp_path / "out", ratio=0.5)
    assert isinstance(caught.value.__cause__, MemoryError) and seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not list(tmp_path.iterdir())


def test_what_openvino_cannot_convert_is_named_and_its_report_left_out() -> None:
    def program(*_: Any, **__: Any) -> None:
        raise RuntimeError("a log\nof pages\n-- Conversion is failed for: <built-in function getitem>, scan\n")

    component = SimpleNamespace(name="prefill", program=program)
    with pytest.raises(ExportError, match=r"prefill .* cannot convert `getitem` and `scan`: ") as raised:
        openvino.write(component, Path(), None)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value) and "of pages" in str(raised.value.__cause__)
    assert openvino.unconverted("another error") == []
