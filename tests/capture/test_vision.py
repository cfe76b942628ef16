"""The compiled vision encoder: what the eager one gives, from one graph (two, where 1 is a size of its own)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import FEATURES, LAYER_FEATURES, join_features
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting.encoder import encoder_components
from tests import zoo
from tests.runtime.models import generate, picture

MODULES = {"qwen2_5_vl": 1, "qwen3_vl": 1, "llava_onevision": 2}
"""Modules of the body that encode."""


def features(model: Any, size: Any, name: str) -> list[Tensor]:
    with torch.no_grad():
        outputs = run_encoders(model, dict(zoo.inputs(name, model, rows=[size])))["mm_encoder_outputs"]
    joined = join_features(outputs)["image"]
    return tree_leaves([joined[FEATURES], joined.get(LAYER_FEATURES) or []])


@pytest.mark.parametrize("name", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl", "llava_onevision"])
def test_features_are_the_eager_ones_at_any_size(name: str) -> None:
    model, twin = zoo.build(name, layers=1), zoo.build(name, layers=1)
    hawk_compile.optimize(model, ratio=0.8, backend="eager", compile_vision=True)
    before = counters["stats"]["unique_graphs"]
    for size in zoo.sizes(name)[:5]:
        for found, expected in zip(features(model, size, name), features(twin, size, name), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert MODULES[name] <= counters["stats"]["unique_graphs"] - before <= 2 * MODULES[name]


def test_answers_of_a_compiled_encoder() -> None:
    model, twin = zoo.build("qwen2_5_vl", layers=1), zoo.build("qwen2_5_vl", layers=1)
    hawk_compile.optimize(twin, ratio=0.6, backend="eager")
    expected = generate(twin, picture("qwen2_5_vl"), 3)
    hawk_compile.optimize(model, ratio=0.6, backend="eager", compile_vision=True)
    runtime = model.__dict__["_hawk_runtime"]
    found = generate(model, picture("qwen2_5_vl"), 3)
    assert list(runtime.vision.compiled) == ["visual"]
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert (one - other).abs().max() < 1e-4
    hawk_compile.optimize(model, ratio=0.3, backend="eager", compile_vision=True)
    assert model.__dict__["_hawk_runtime"].vision is runtime.vision
    hawk_compile.restore(model)
    assert "forward" not in model.base_model.visual.__dict__


def test_an_export_takes_the_modules_as_they_are() -> None:
    model = hawk_compile.optimize(zoo.build("qwen3_vl", layers=1), ratio=0.8, backend="eager", compile_vision=True)
    generate(model, picture("qwen3_vl"), 1)
    assert [component.name for component in encoder_components(model, picture("qwen3_vl"))] == ["visual"]


@pytest.mark.parametrize(
    ("name", "module"), [("glm4v", "visual"), pytest.param("mistral3", "vision_tower", marks=pytest.mark.slow)]
)
def test_an_encoder_that_reads_sizes_on_its_way_is_refused(name: str, module: str) -> None:
    model = hawk_compile.optimize(zoo.build(name, layers=1), ratio=0.8, backend="eager", compile_vision=True)
    with pytest.raises(UnsupportedModelError, match=f"the encoder's {module} cannot be compiled as one"):
        generate(model, picture(name), 1)
    hawk_compile.optimize(model, ratio=0.8, backend="eager")
    generate(model, picture(name), 1)


def test_a_tower_that_reads_the_grid_elsewhere_is_refused() -> None:
    """Its outputs by segments are not those by the grid: seen at the first call, before anything is answered."""
    model = zoo.build("qwen3_vl", layers=1)
    hawk_compile.optimize(model, ratio=0.8, backend="eager", compile_vision=True)
    forward = type(model.base_model.visual).forward

    def louder(self: Any, hidden_states: Tensor, grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        found = forward(self, hidden_states, grid_thw=grid_thw, **kwargs)
        found.pooler_output = found.pooler_output * (1.0 if grid_thw is None else 2.0)
        return found

    model.base_model.visual.forward = louder.__get__(model.base_model.visual)
    with pytest.raises(UnsupportedModelError, match="its outputs differ by"):
        generate(model, picture("qwen3_vl"), 1)
    assert model.base_model.visual.__dict__["forward"].__name__ == "louder"
