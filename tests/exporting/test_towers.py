"""Towers over packed patches that look at the sizes of images, or at the bounds of segments, beside their attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hawk_compile.capture import segments
from hawk_compile.errors import CaptureError
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.tools.survey.tiny import build, prompt, read

ARCHITECTURES = Path(__file__).parents[1] / "architectures"


def tower(name: str) -> tuple[Any, Component]:
    """A type's tower, and the component that is made of it."""
    tiny = read(ARCHITECTURES / f"{name}.json")
    model = build(tiny)
    component = encoder_components(model, prompt(tiny, rows=1))[0]
    return model.base_model.get_submodule(component.name), component


@pytest.mark.parametrize("name", ["glm4v", "muse_glimmer"])
def test_sizes_and_bounds_are_inputs_where_a_tower_reads_them(name: str) -> None:
    """Positions by sizes and bounds; layers that hand on bounds and no longest length, with windows among them."""
    child, component = tower(name)
    assert {"grids", "segment_ends"} <= component.shapes.keys()
    graph = component.trace().module(check_guards=False)
    pixels = next(key for key, shape in component.shapes.items() if len(shape) == 2 and shape[0] == "patches")
    width = component.sample[pixels].shape[1]
    for grids in ([[1, 4, 8]], [[1, 8, 4], [1, 4, 4], [1, 12, 8]]):  # height, width: neither is what was traced
        sizes = torch.tensor(grids)
        patches = torch.randn(int(sizes.prod(1).sum()), width)
        with torch.no_grad():
            expected = segments.named(child(patches, grid_thw=sizes))
            given = segments.prepared(child, {pixels: patches, "grid_thw": sizes}, plain=True)
            found: dict[str, Tensor] = graph(**given)
        for key, values in found.items():
            assert (values - expected[key]).abs().max() < 1e-4 * expected[key].abs().max()


def test_a_tower_that_reads_neither_has_indices_alone() -> None:
    _, component = tower("qwen2_5_vl")
    assert not {"grids", "segment_ends", "window_ends"} & component.shapes.keys()


@pytest.mark.parametrize(("name", "match"), [
    ("lfm3_vl", "vision_tower cannot be captured for other sizes .* its code fixes the size images of grids to 2"),
    ("hunyuan_vl", r"vision_tower cannot be captured as one graph at .*modeling_hunyuan_vl\.py:\d+, in interpol"),
    ("cosmos3_edge", r"visual cannot be captured as one graph at .*modeling_cosmos3_edge\.py:\d+, in resize_pos"),
])  # fmt: skip
def test_a_tower_that_goes_through_images_in_python_is_refused_by_its_line(name: str, match: str) -> None:
    _, component = tower(name)
    with pytest.raises(CaptureError, match=match) as caught:
        component.trace()
    assert "prune the model with hawk_compile.optimize" in str(caught.value) and "\n" not in str(caught.value)
