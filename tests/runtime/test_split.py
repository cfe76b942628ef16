"""Models whose modules accelerate places or offloads by hooks: a decoder that is whole prunes, any other is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_execution_device_hook,
    remove_hook_from_submodules,
)

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


@pytest.mark.gpu
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
