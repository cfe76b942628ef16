"""`hawk_compile.inspect` finds without weights what `optimize` uses with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hawk_compile
from hawk_compile.errors import ConfigError, InputError, UnsupportedModelError
from hawk_compile.tools.survey.table import read_types
from tests import timm_at_hand, zoo
from tests.tiny import tiny
from tests.zoo import Row, common

QUICK = ("instructblipvideo", "vibevoice_asr")
"""Required arguments and a video's encoder; eager attention alone and audio under a name of its own."""
NEEDS_FRAMES = "qwen2_audio"
RIGHT = sorted(name for name, known in read_types().surveys.items() if known.right and name != NEEDS_FRAMES)


def inspected(name: str, **settings: object) -> hawk_compile.Inspection:
    settings = {"image_tokens": 64, "text_tokens": 20, "layers": 1} | settings
    return hawk_compile.inspect(zoo.build(name).config, **settings)  # type: ignore[arg-type]


def folder_of(name: str, folder: Path) -> Path:
    """A checkpoint folder of a tiny model, without its weights."""
    described = tiny(name)
    config = getattr(transformers, described.config_class)(**described.config)
    config.architectures = [described.model_class]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RIGHT]
)
def test_a_type_that_optimize_prunes(name: str, tmp_path: Path) -> None:
    """By the layer that scores when it runs."""
    settings: dict[str, Any] = {"image_tokens": 64, "text_tokens": 20, "layers": 1}
    if (modalities := tiny(name).modalities) is not None:
        settings["modalities"] = modalities
    try:
        found = hawk_compile.inspect(folder_of(name, tmp_path), **settings)
    except UnsupportedModelError as error:
        if (reason := timm_at_hand.reason()) and "pip install timm" in str(error):
            pytest.skip(reason)
        raise
    assert (found.model, found.scoring_layer) == (tiny(name).model_class, read_types().surveys[name].layer)
    assert {"tokens", "length"} & {each.along for each in found.gathered}


def test_a_model_that_encodes_audio_in_its_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no prefill can be captured without audio frames"):
        hawk_compile.inspect(folder_of(NEEDS_FRAMES, tmp_path))


def test_a_package_that_a_model_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*_: Any, **__: Any) -> None:
        raise ImportError("\nNet requires the timm library but it was not found. Install it with:\n`pip install timm`.")

    monkeypatch.setattr(transformers.AutoModelForMultimodalLM, "from_config", lacks)
    with pytest.raises(UnsupportedModelError, match=r"Net requires the timm library .* `pip install timm`"):
        hawk_compile.inspect(folder_of("fuyu", tmp_path))


def test_a_folded_model() -> None:
    found = inspected("llava", ratio=0.8)
    assert (found.heads, found.kv_heads, found.head_dim, found.width) == (4, 2, 16, 64)
    assert found.form == "folded"
    assert found.norm == "model.language_model.layers.0.input_layernorm"
    assert found.query_projection == "model.language_model.layers.0.self_attn.q_proj"
    assert (found.layers, found.captured_layers) == (3, 1)
    assert (found.visual_tokens, found.kept_visual_tokens, found.prompt_tokens, found.kept_tokens) == (64, 13, 84, 33)
    assert found.placeholders == (common.IMAGE,)
    assert {"tokens", "length"} == {each.along for each in found.gathered}
    assert ("1", "S", "64") in [each.shape for each in found.gathered]


def test_norms_behind_the_projection_and_features_for_later_layers() -> None:
    found = inspected("qwen3_vl")
    assert found.form == "projected"
    assert "q_norm" in found.why and "k_norm" in found.why
    assert found.key_projection == "model.language_model.layers.0.self_attn.k_proj"
    assert ("V", "64") in [each.shape for each in found.gathered if each.along == "visual tokens"]


def test_features_as_one_tensor() -> None:
    assert inspected("internvl").form == "folded"


def test_flops_are_those_of_the_decoder() -> None:
    found = inspected("qwen2_5_vl", image_tokens=100, text_tokens=28)
    width, inner, heads, length = common.WIDTH, 96, common.HEADS * common.HEAD_DIM, 128
    layer = 2 * length * width * (2 * heads + 2 * common.KV_HEADS * common.HEAD_DIM + 3 * inner)
    layer += 4 * length * length * heads
    assert found.flops == 3 * layer + 2 * width * common.VOCAB
    assert found.kept_flops is not None and found.flop_ratio is not None
    assert found.kept_flops < found.flops and 0 < found.flop_ratio < 1


def test_a_model_is_left_as_it_is() -> None:
    model = zoo.build("qwen2_5_vl")
    inputs = zoo.inputs("qwen2_5_vl", model, rows=[Row(images=((4, 6),))])
    hawk_compile.optimize(model, ratio=0.5, backend="eager")
    held, before = set(model.__dict__), model(**inputs).logits
    found = hawk_compile.inspect(model, image_tokens=64, text_tokens=20)
    assert found.heads == 4
    assert set(model.__dict__) == held
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("source", [3, None])
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        hawk_compile.inspect(source)  # type: ignore[arg-type]


def test_settings_are_those_of_the_config() -> None:
    """By name or as one config; the graph is the one that they ask for."""
    budget = hawk_compile.Adaptive(0.9)
    found = inspected("llava", ratio=0.75, budget=budget, min_per_image=20, normalization="softmax")
    assert (found.ratio, found.kept_visual_tokens) == (0.75, 20)
    config = hawk_compile.HawkConfig(ratio=0.5)
    assert hawk_compile.inspect(zoo.build("llava").config, config, image_tokens=64, layers=1).kept_visual_tokens == 32


def test_settings_are_checked() -> None:
    source = zoo.build("llava").config
    with pytest.raises(ConfigError, match="unknown setting speed"):
        hawk_compile.inspect(source, speed=3)
    with pytest.raises(ConfigError, match="either a config or single settings"):
        hawk_compile.inspect(source, hawk_compile.HawkConfig(), ratio=0.5)
    with pytest.raises(ConfigError, match=r"ratio .* got 1\.5"):
        hawk_compile.inspect(source, ratio=1.5)
    with pytest.raises(UnsupportedModelError, match="tokens that LlavaForConditionalGeneration does not have"):
        hawk_compile.inspect(source, modalities=("audio",))
