"""Models whose modules accelerate places or offloads by hooks: a decoder that is whole prunes, any other is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_execution_device_hook,
    remove_hook_from_submodules,
)
from accelerate.state import AcceleratorState
from transformers import AutoModelForImageTextToText

import hawk_compile
from hawk_compile.errors import UnsupportedModelError
from tests import zoo
from tests.runtime.models import ROUNDING, conversation, fresh, generate, new_tokens, picture
from tests.runtime.test_optimize import state
from tests.runtime.test_wrappers import NAME, check, is_whole, settings

CPU = torch.device("cpu")
OFFLOADED = r"model\.model\.language_model[\w.]* is offloaded .* must be held whole by one device"


def encoder_on_disk(model: Any, folder: Path) -> None:
    """As from_pretrained does with such a device_map."""
    tower, *others = (f"model.{name}" for name, _ in model.model.named_children())
    dispatch_model(model, {tower: "disk", **dict.fromkeys(others, "cpu"), "lm_head": "cpu"}, offload_dir=str(folder))
    assert all(parameter.is_meta for parameter in model.get_submodule(tower).parameters())


def test_an_encoder_that_is_offloaded(tmp_path: Path) -> None:
    model = zoo.build(NAME, layers=2)
    encoder_on_disk(model, tmp_path)
    before = state(model)
    hawk_compile.optimize(model, **settings())
    check(model)
    with pytest.raises(UnsupportedModelError, match="compile_vision: a hook of accelerate's"):
        hawk_compile.optimize(model, **settings(), compile_vision=True)
    assert is_whole(hawk_compile.restore(model)) and state(model) == before


@pytest.mark.parametrize("offload", ["cpu", "disk", "the decoder"])
def test_a_decoder_that_is_offloaded(offload: str, tmp_path: Path) -> None:
    model = zoo.build(NAME, layers=2)
    if offload == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif offload == "disk":
        disk_offload(model, str(tmp_path), execution_device=CPU)
    else:
        cpu_offload(model.model.language_model, execution_device=CPU)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=OFFLOADED):
        hawk_compile.optimize(model, **settings())
    with pytest.raises(UnsupportedModelError, match=OFFLOADED), hawk_compile.pruned(model, **settings()):
        pass
    assert state(model) == before and is_whole(model)


def test_a_decoder_on_several_devices() -> None:
    """What device_map="auto" makes on a machine of several; of the second there is only its name here."""
    model = zoo.build(NAME, layers=2)
    first, second = model.model.language_model.layers
    add_hook_to_module(first, AlignDevicesHook(CPU))
    hook = AlignDevicesHook()
    hook.execution_device = "cuda:1"
    add_hook_to_module(second, hook)
    with pytest.raises(
        UnsupportedModelError, match=r"layers.1 runs on cuda:1 by a hook .* embeddings are on cpu.*device_map"
    ):
        hawk_compile.optimize(model, **settings())


@pytest.mark.slow
def test_hooks_that_come_behind_optimize(tmp_path: Path) -> None:
    """Before a call or behind one: as soon as there is a hook, the call is right or refused."""
    for called in (False, True):
        model = fresh(NAME)
        if called:
            check(model)
        encoder_on_disk(model, tmp_path / str(called))
        check(model)
        remove_hook_from_submodules(model)
        check(model)
        attach_execution_device_hook(model.model.language_model, CPU)
        check(model)
        check(copy.deepcopy(model))
        cpu_offload(model.model.language_model, execution_device=CPU)
        with pytest.raises(UnsupportedModelError, match=OFFLOADED):
            model(**picture(NAME))
        assert is_whole(hawk_compile.restore(model))
        assert not [path for path, part in model.named_modules() if "unhooked" in repr(vars(part).get("forward"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_generation_by_hooks(name: str, tmp_path: Path) -> None:
    inputs = picture(name)
    model = hawk_compile.optimize(zoo.build(name, layers=2), **settings())
    encoder_on_disk(model, tmp_path)
    out = generate(model, inputs, 6)
    by_hand = conversation(name, inputs)
    torch.testing.assert_close(out.logits[0][0].log_softmax(-1), by_hand.logits[-1].log_softmax(-1), **ROUNDING)
    assert new_tokens(out, inputs) == by_hand.greedy(6)
    assert hawk_compile.report(out).reason.startswith("ratio=0.6 removes")
    static = generate(model, inputs, 6, cache_implementation="static")
    assert static.sequences.equal(out.sequences)


@pytest.mark.slow
def test_what_from_pretrained_makes_of_a_device_map(tmp_path: Path) -> None:
    zoo.build(NAME, layers=2).save_pretrained(tmp_path)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")

    def loaded(device_map: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            tmp_path, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offloaded"
        ).eval()

    for device_map in ("auto", {"": "cpu"}, dict.fromkeys(parts, "cpu") | {parts[0]: "disk"}):
        model = hawk_compile.optimize(loaded(device_map), **settings())
        check(model)
        out = generate(model, picture(NAME), 4)
        assert new_tokens(out, picture(NAME)) == conversation(NAME, picture(NAME)).greedy(4)
    with pytest.raises(UnsupportedModelError, match=OFFLOADED):
        hawk_compile.optimize(loaded(dict.fromkeys(parts, "cpu") | {parts[2]: "disk"}), **settings())


@pytest.mark.slow
def test_what_accelerate_wraps_it_unwraps() -> None:
    model, hook = cpu_offload_with_hook(fresh(NAME), execution_device="cpu")
    check(model)
    hook.remove()
    check(model)
    for mode in ("no", "bf16"):
        accelerator = Accelerator(cpu=True, mixed_precision=mode)
        try:
            wrapped = accelerator.prepare(fresh(NAME))
            assert not is_whole(wrapped)
            check(accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first", ["optimize", "dispatch"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_an_encoder_on_another_device(name: str, first: str) -> None:
    """The encoder on the host, the decoder on a GPU; inputs on either."""
    inputs = picture(name)
    expected = generate(fresh(name), inputs, 6)
    model = zoo.build(name, layers=2)
    if first == "optimize":
        hawk_compile.optimize(model, **settings())
    tower, *others = (f"model.{part}" for part, _ in model.model.named_children())
    decoder = {path: 0 for path in others if path.endswith("language_model")}
    rest = dict.fromkeys([tower, *others], "cpu") | decoder | {"lm_head": 0}
    dispatch_model(model, rest, main_device="cpu")
    if first != "optimize":
        hawk_compile.optimize(model, **settings())
    for device in ("cpu", "cuda"):
        here = {key: value.to(device) for key, value in inputs.items()}
        for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
            out = generate(model, here, 6, **more)
            if not more:
                assert out.sequences.cpu().equal(expected.sequences)
                torch.testing.assert_close(out.logits[0].cpu(), expected.logits[0], atol=1e-3, rtol=1e-3)
            assert hawk_compile.report(out).kept_visual_tokens.equal(hawk_compile.report(expected).kept_visual_tokens)
