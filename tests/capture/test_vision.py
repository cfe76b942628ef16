"""The compiled vision encoder: what the eager one gives, from one graph (two, where 1 is a size of its own)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import FEATURES, LAYER_FEATURES, join_features
from hawk_compile.capture.patches import install_recorders
from hawk_compile.capture.vision import CompiledVision
from hawk_compile.errors import CaptureError, UnsupportedModelError
from hawk_compile.exporting.encoder import encoder_components
from tests import zoo
from tests.marks import slow
from tests.runtime.models import generate, picture

MODULES = {"qwen2_5_vl": 1, "qwen3_vl": 1, "llava_onevision": 2}
"""Modules of the body that encode."""


def features(model: Any, size: Any, name: str) -> list[Tensor]:
    with torch.no_grad():
        outputs = run_encoders(model, dict(zoo.inputs(name, model, rows=[size])))["mm_encoder_outputs"]
    joined = join_features(outputs)["image"]
    return tree_leaves([joined[FEATURES], joined.get(LAYER_FEATURES) or []])


@pytest.mark.parametrize("name", ["qwen3_vl", *slow("qwen2_5_vl", "llava_onevision")])
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
    assert list(runtime.vision.modules) == ["visual"]
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert (one - other).abs().max() < 1e-4
    hawk_compile.optimize(model, ratio=0.3, backend="eager", compile_vision=True)
    assert model.__dict__["_hawk_runtime"].vision is runtime.vision


def test_an_export_takes_the_modules_as_they_are() -> None:
    model = hawk_compile.optimize(zoo.build("qwen3_vl", layers=1), ratio=0.8, backend="eager", compile_vision=True)
    generate(model, picture("qwen3_vl"), 1)
    assert [component.name for component in encoder_components(model, picture("qwen3_vl"))] == ["visual"]


@pytest.mark.parametrize(
    ("name", "module"), [("glm4v", "visual"), pytest.param("mistral3", "vision_tower", marks=pytest.mark.slow)]
)
def test_an_encoder_that_reads_sizes_on_its_way_is_refused(name: str, module: str) -> None:
    model = hawk_compile.optimize(zoo.build(name, layers=1), ratio=0.8, backend="eager", compile_vision=True)
    with pytest.raises(CaptureError, match=f"encoder's {module} cannot be captured as one.*leave compile_vision out"):
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
    with pytest.raises(UnsupportedModelError, match=r"reads the sizes of images elsewhere.*its outputs differ by"):
        generate(model, picture("qwen3_vl"), 1)
    assert model.base_model.visual.__dict__["forward"].__name__ == "louder"


def visual(model: Any) -> Any:
    """The Qwen tower's own features of one image, as the model gives them to its merge."""
    (rows,) = features(model, zoo.sizes("qwen2_5_vl")[2], "qwen2_5_vl")[:1]
    return rows


def compiled(name: str = "qwen2_5_vl") -> Any:
    return hawk_compile.optimize(zoo.build(name, layers=1), ratio=0.8, backend="eager", compile_vision=True)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def with_backend(model: Any, backend: Callable[..., Any]) -> CompiledVision:
    """Let the encoder's graphs be run by a function of theirs."""
    vision = model.__dict__["_hawk_runtime"].vision = CompiledVision(backend)  # type: ignore[arg-type]
    return vision


def test_nothing_is_put_on_the_model_or_the_process() -> None:
    """Neither while the encoder runs nor behind it: the model's own modules stay eager for whoever calls them. The copy
    is made once."""
    model = compiled()
    tower = model.base_model.visual
    install_recorders(tower)  # as the model does itself, at its first such call
    held, argsort, seen = set(tower.__dict__), torch.argsort, []

    def watching(gm: Any, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append((tower.config._attn_implementation, torch.argsort is argsort, set(tower.__dict__) == held))
            return gm(*args)

        return run

    vision = with_backend(model, watching)
    first = visual(model)
    module, graphs = vision.modules["visual"], counters["stats"]["unique_graphs"]
    assert torch.equal(visual(model), first)
    assert seen == [("sdpa", True, True)] * 2
    assert set(tower.__dict__) == held and tower.config._attn_implementation == "sdpa"
    assert vision.modules["visual"] is module and counters["stats"]["unique_graphs"] == graphs
    assert all(one is other for one, other in zip(module.module.parameters(), tower.parameters(), strict=True))


def swap_a_parameter(tower: Any) -> None:
    bias = tower.merger.mlp[2].bias
    tower.merger.mlp[2].bias = torch.nn.Parameter(bias.detach() + 1)


def write_into_a_parameter(tower: Any) -> None:
    with torch.no_grad():
        tower.merger.mlp[2].bias.add_(1)


def assign_a_state(tower: Any) -> None:
    tower.load_state_dict({name: 1.5 * value for name, value in tower.state_dict().items()}, assign=True)


def change_a_buffer(tower: Any) -> None:
    tower.rotary_pos_emb.inv_freq = tower.rotary_pos_emb.inv_freq * 1.1


def put_an_adapter_in(tower: Any) -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, inner: Any):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.5 * x.mean(-1, keepdim=True)

    tower.blocks[0].attn.proj = Adapter(tower.blocks[0].attn.proj)


def wrap_a_forward(tower: Any) -> None:
    forward = tower.merger.forward
    tower.merger.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def double(tower: Any) -> None:
    tower.to(torch.float64)


CHANGES = (
    swap_a_parameter, write_into_a_parameter, assign_a_state, change_a_buffer, put_an_adapter_in, wrap_a_forward, double
)  # fmt: skip


def test_what_changes_on_the_model_changes_in_the_compiled_encoder() -> None:
    model, eager = compiled(), zoo.build("qwen2_5_vl", layers=1)
    before = visual(model)
    assert close(before, visual(eager))
    for change in CHANGES:
        for tower in (model.base_model.visual, eager.base_model.visual):
            change(tower)
        found, expected = visual(model), visual(eager)
        assert close(found, expected) and found.dtype == expected.dtype, change.__name__
        assert expected.dtype != before.dtype or not close(before, expected), change.__name__
        before = expected


def test_threads_encode_side_by_side() -> None:
    """Two on one model and one on another are inside a graph at once: each waits there for the others."""
    barrier, waits = threading.Barrier(3), threading.Event()

    def meeting(gm: Any, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            if waits.is_set():
                barrier.wait(timeout=60)
            return gm(*args)

        return run

    names = ("qwen2_5_vl", "qwen3_vl")
    models = {name: compiled(name) for name in names}
    for model in models.values():
        with_backend(model, meeting)

    def encoded(name: str, which: int) -> list[Tensor]:
        inputs = zoo.inputs(name, models[name], rows=[zoo.sizes(name)[which]])
        with torch.no_grad():
            kwargs = models[name]._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
        return tree_leaves(kwargs["mm_encoder_outputs"]["image"].pooler_output)

    calls = [(names[0], 2), (names[0], 3), (names[1], 3)]
    alone = [encoded(*call) for call in calls]
    waits.set()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(encoded, *zip(*calls, strict=True)))
    for one, other in zip(tree_leaves(together), tree_leaves(alone), strict=True):
        assert torch.equal(one, other)
