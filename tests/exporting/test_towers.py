"""What components are made of encoders: towers that look at sizes of images or bounds of segments beside their
attention, and modules that run by another method than their forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.capture import segments
from hawk_compile.errors import CaptureError, UnsupportedModelError
from hawk_compile.exporting import bounds, onnx
from hawk_compile.exporting.calls import Session, encoder_call
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.exporting.manifest import Part, TensorSpec
from hawk_compile.exporting.modules import Encoder, check_tuple, unnamed
from hawk_compile.exporting.parts import write_part
from hawk_compile.tools.survey.tiny import build, prompt, read
from tests import zoo
from tests.marks import slow
from tests.tiny import FOLDER


def tower(name: str) -> tuple[Any, Component]:
    """A type's tower, and the component that is made of it."""
    tiny = read(FOLDER / f"{name}.json")
    model = build(tiny)
    component = encoder_components(model, prompt(tiny, rows=1))[0]
    return model.base_model.get_submodule(component.name), component


def check_other_sizes(child: Any, component: Component, session: Session) -> None:
    """A tower's own outputs, of one image and of three, none of the size that was traced."""
    pixels = next(key for key, shape in component.shapes.items() if len(shape) == 2 and shape[0] == "patches")
    width = component.sample[pixels].shape[1]
    for grids in ([[1, 4, 8]], [[1, 8, 4], [1, 4, 4], [1, 12, 8]]):
        sizes = torch.tensor(grids)
        patches = torch.randn(int(sizes.prod(1).sum()), width)
        with torch.no_grad():
            expected = segments.named(child(patches, grid_thw=sizes))
            found = session(bounds.prepared(child, {pixels: patches, "grid_thw": sizes}))
        for key, values in found.items():
            assert (values - expected[key]).abs().max() < 1e-4 * expected[key].abs().max()


@pytest.mark.parametrize("name", ["glm4v", *slow("muse_glimmer")])
def test_sizes_and_bounds_are_inputs_where_a_tower_reads_them(name: str) -> None:
    """Positions by sizes and bounds; layers that hand on bounds and no longest length, with windows among them."""
    child, component = tower(name)
    assert {"grids", "segment_ends"} <= component.shapes.keys()
    graph = component.trace().module(check_guards=False)
    check_other_sizes(child, component, lambda given: graph(**given))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4v", "muse_glimmer"])
def test_onnx_takes_sizes_and_bounds(name: str, tmp_path: Path) -> None:
    """Nothing in a graph of ONNX checks its inputs, so that a size that was fixed would be answered wrongly."""
    child, component = tower(name)
    part = write_part(onnx, component, tmp_path, onnx.Options())
    check_other_sizes(child, component, onnx.open_session(tmp_path, part.file, part))


def test_attention_within_bounds_that_a_tower_counts_itself() -> None:
    """Rows of unequal lengths, which the exporters' own attention mixes up."""
    child, component = tower("qwen3_asr")
    assert {"input_features", "input_features_mask", "segment_ends"} == component.shapes.keys()
    graph = component.trace().module(check_guards=False)
    width, frames = component.sample["input_features"].shape[1:]
    mask = (torch.arange(frames) < torch.tensor([[frames], [frames // 3], [frames - 7]])).long()
    given = {"input_features": torch.randn(3, width, frames), "input_features_mask": mask}
    with torch.no_grad():
        expected = child(**given).last_hidden_state
        (found,) = graph(**bounds.prepared(child, given)).values()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


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


@pytest.mark.parametrize(("name", "names"), [
    ("emu3", ["vqmodel.encoder", "vqmodel.quant_conv", "vqmodel.quantize", "text_model.embed_tokens"]),
    ("chameleon", ["vqmodel.encoder", "vqmodel.quant_conv", "vqmodel.quantize", "embed_tokens"]),
])  # fmt: skip
def test_modules_in_one_that_runs_by_another_method_are_components(name: str, names: list[str]) -> None:
    """A quantiser gives whole numbers, which no gradient comes back through."""
    tiny = read(FOLDER / f"{name}.json")
    components = encoder_components(build(tiny), prompt(tiny, rows=1))
    assert [component.name for component in components] == names
    (numbers,) = components[2].results.values()
    assert numbers.dtype == torch.int64


def test_a_weight_that_no_forward_uses_is_named() -> None:
    model: Any = zoo.build("llava", layers=1)
    body, features = model.base_model, model.base_model.get_image_features

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = features(*args, **kwargs)
        weight = body.multi_modal_projector.linear_1.weight
        output.pooler_output = [part * weight.sum() for part in output.pooler_output]
        return output

    body.get_image_features = scaled
    with pytest.raises(UnsupportedModelError, match=r"it uses multi_modal_projector\.linear_1\.weight otherwise"):
        encoder_components(model, zoo.inputs("llava", model, rows=[zoo.sizes("llava")[0]]))


def run_by_graphs(model: Any, components: list[Component]) -> None:
    """Let the modules of an encoder be run by graphs, as `load` lets them by sessions."""
    for component in components:
        child = model.base_model.get_submodule(component.name)
        graph = component.trace().module(check_guards=False)
        inputs = [TensorSpec(name, "", list(shape)) for name, shape in component.shapes.items()]
        part = Part(component.name, "", {}, inputs, [], {}, 0.0)
        child.forward = encoder_call(child, lambda given, graph=graph: graph(**given), part)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opened"), [("paddleocr_vl", "projector"), ("ernie4_5_vl_moe", "resampler_model")])
def test_modules_on_rows_are_components_where_one_lays_rows_out_by_sizes(name: str, opened: str) -> None:
    """Two images of other sizes than what was traced, behind a tower that may take its patches as a batch of one."""
    tiny = read(FOLDER / f"{name}.json")
    model, plain = build(tiny), build(tiny)
    inputs = prompt(tiny, rows=1)
    components = encoder_components(model, inputs)
    assert sum(component.name.startswith(f"{opened}.") for component in components) == len(components) - 1
    sizes = torch.tensor([[1, 4, 6], [1, 8, 4]])
    pixels = torch.randn(56, *inputs["pixel_values"].shape[1:])
    run_by_graphs(model, components)
    with torch.no_grad():
        expected, found = (each.get_image_features(pixels, sizes).pooler_output for each in (plain, model))
    for values, wanted in zip(found, expected, strict=True):
        assert (values - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_row_of_patches_in_a_batch_of_one_is_symbolic() -> None:
    _, component = tower("paddleocr_vl")
    assert component.shapes["pixel_values"][:2] == (1, "patches") and component.shapes["position_ids"][0] == "patches"


class InParts(nn.Module):
    """A tuple: of as many tensors as it has rows, or of two."""

    def __init__(self, by_rows: bool):
        super().__init__()
        self.by_rows = by_rows

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        return tuple(values) if self.by_rows else (values, values + 1)


def test_a_tuple_is_given_part_by_part() -> None:
    sample = {"values": torch.randn(4, 3)}
    shapes: Any = {"values": ("tiles", 3)}
    two = Component("two", Encoder(InParts(False), {}, ["output.1.2"]), sample, shapes)
    check_tuple(two, "Model")
    left_out, given = unnamed(two.results)
    assert left_out is None and torch.equal(given, sample["values"] + 1)
    by_rows = Component("rows", Encoder(InParts(True), {}, ["output.0.2", "output.1.2"]), sample, shapes)
    with pytest.raises(UnsupportedModelError, match="its encoder's rows gives a tuple of as many tensors as there are"):
        check_tuple(by_rows, "Model")
