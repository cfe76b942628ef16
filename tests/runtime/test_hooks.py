"""Hooks that users put on modules: what a graph cannot call is refused by name, all others are called at every call."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.module_tracker import ModuleTracker

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.state import RUNTIME
from tests.runtime.models import fresh, generate, picture, plain, pruned

NAME = "llava"
KINDS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**picture(NAME)).logits


def note(calls: list[int], *args: Any, **kwargs: Any) -> None:
    calls.append(1)


def compilations(model: Any) -> int:
    return model.__dict__[RUNTIME].prefill.compilations


@pytest.mark.parametrize("path", [
    "model", "model.language_model", "model.language_model.layers.1", "model.language_model.layers.0.self_attn",
    "model.language_model.embed_tokens", "lm_head"])  # fmt: skip
def test_hooks_inside_the_graph_are_refused_as_soon_as_they_are_there(path: str) -> None:
    """Added behind a call, at the next; once they are taken off the same graph serves."""
    model, calls = pruned(NAME), []
    expected, compiled = logits(model), compilations(model)
    for kind in KINDS:
        handle = getattr(model.get_submodule(path), kind)(functools.partial(note, calls))
        with pytest.raises(UnsupportedCallError, match=rf"\(note of {__name__} of {path}\): take them off") as refused:
            logits(model)
        handle.remove()
        assert "output_hidden_states=True" in str(refused.value) and "hawk_compile.restore" in str(refused.value)
        assert torch.equal(logits(model), expected) and compilations(model) == compiled
    assert not calls


def test_a_hook_from_before_optimize_is_refused_too_and_restored_models_call_it() -> None:
    model, lengths = plain(NAME), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    hawk_compile.optimize(model, ratio=0.6, backend="eager")
    try:
        with pytest.raises(UnsupportedCallError, match=r"of lm_head\)"):
            generate(model, picture(NAME))
        assert not lengths
    finally:
        hawk_compile.restore(model)
    logits(model)
    handle.remove()
    assert lengths == [picture(NAME)["input_ids"].shape[1]]


def test_a_hook_whose_code_has_no_module_is_refused_too() -> None:
    def hook(*args: Any) -> None:
        pass

    hook.__module__ = None  # type: ignore[assignment]  # as functions are that were made from a text
    handle = pruned(NAME).lm_head.register_forward_hook(hook)
    try:
        with pytest.raises(UnsupportedCallError, match=r"hook of <unknown> of lm_head\)"):
            logits(pruned(NAME))
    finally:
        handle.remove()


def test_hooks_on_the_model_and_on_its_encoders_are_called_every_time() -> None:
    """Those of the model see the pruned output, and may change the arguments; forward passes make no backward calls."""
    model = pruned(NAME)
    expected, compiled, seen = logits(model), compilations(model), []

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(tuple(output.logits.shape) if "logits" in output else tuple(output.last_hidden_state.shape))

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "logits_to_keep": 1}

    handles = [part.register_forward_hook(after, with_kwargs=True, always_call=True)
               for part in (model, model.model.vision_tower)]  # fmt: skip
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert [shape[1] for shape in seen] == [17, expected.shape[1]] * 2
    handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
    torch.testing.assert_close(logits(model), expected[:, -1:])
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model), expected) and compilations(model) == compiled + 1


def test_hooks_of_every_module_are_refused_and_trackers_of_torch_are_not() -> None:
    model, calls = pruned(NAME), []
    expected = logits(model)
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(functools.partial(note, calls))
        with pytest.raises(UnsupportedCallError, match=rf"hooks for every module are registered \(note of {__name__}"):
            model.forward(**picture(NAME))
        handle.remove()
    assert not calls
    with ModuleTracker():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_recorders_of_hidden_states_come_and_stay() -> None:
    """transformers puts them on the layers as hooks: part of what the model computes."""
    model = fresh(NAME)
    expected = logits(model)
    with torch.no_grad():
        states = model(**picture(NAME), output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {expected.shape[1]}
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_hooks_within_a_compiled_encoder_are_refused() -> None:
    """Those of the encoder itself are around its graph."""
    model, calls = fresh(NAME, compile_vision=True), []
    expected, tower = logits(model), model.model.vision_tower
    whole = tower.register_forward_hook(functools.partial(note, calls))
    assert torch.equal(logits(model), expected) and calls == [1]
    handle = next(tower.children()).register_forward_hook(functools.partial(note, calls))
    with pytest.raises(UnsupportedCallError, match=r"of vision_tower\.\w+\): leave compile_vision out"):
        logits(model)
    handle.remove()
    whole.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_steps_call_hooks_and_compiled_steps_too() -> None:
    """Behind a pruned prefill; decode steps are no part of its graph."""
    for compiled in (False, True):
        model, lengths = fresh(NAME, compile_decode=compiled), []
        first = model(**picture(NAME))
        layer = model.model.language_model.layers[1]
        handle = layer.register_forward_hook(lambda module, args, output, kept=lengths: kept.append(args[0].shape[1]))
        for _ in range(2):
            model(input_ids=torch.tensor([[30]]), past_key_values=first.past_key_values)
        handle.remove()
        assert lengths == [1, 1]
