"""Others replace a model's methods: what wraps ours goes on pruning, what leaves ours out is said, never hidden."""

from __future__ import annotations

import copy
import functools
import types
import unittest.mock
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

import hawk_compile
from hawk_compile.errors import HawkError
from tests import zoo
from tests.runtime.models import fresh, generate, picture, plain
from tests.runtime.test_optimize import state

RATIO = 0.5
GONE = r"forward was replaced by .* after optimize; nothing is pruned: call optimize again"


def prunes(model: Any) -> bool:
    """Whether a call prunes, seen by its logits; the report must say the same."""
    logits = model(**picture("llava")).logits
    return logits.shape[1] < picture("llava")["input_ids"].shape[1]


def prepared(model: Any) -> Any:
    """As accelerate's `prepare` leaves a model in mixed precision."""
    model._original_forward = model.forward
    inner = model.forward.__func__ if hasattr(model.forward, "__func__") else model.forward
    model.forward = types.MethodType(convert_outputs_to_fp32(torch.autocast("cpu", enabled=False)(inner)), model)
    return model


def test_nothing_leads_past_our_forward() -> None:
    """accelerate and others follow `__wrapped__` to what they take for the model's own forward."""
    model = fresh("llava")
    for name in ("forward", "generate", "save_pretrained"):
        assert not hasattr(getattr(model, name), "__wrapped__"), name


@pytest.mark.parametrize("first", ["optimize", "prepare"])
def test_unwrapping_by_accelerate(first: str) -> None:
    model = zoo.build("llava", layers=2)
    steps = [lambda: hawk_compile.optimize(model, ratio=RATIO, backend="eager"), lambda: prepared(model)]
    for step in steps if first == "optimize" else steps[::-1]:
        step()
    assert prunes(model)
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert unwrapped is model and prunes(model)
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [16]
    hawk_compile.restore(model)
    assert not prunes(model)


@pytest.mark.parametrize("through", ["compiled", "compiled inside"])
def test_unwrapping_of_what_is_compiled(through: str) -> None:
    model = fresh("llava", RATIO)
    compiled = torch.compile(model, backend="eager")
    assert compiled._orig_mod is model
    found = extract_model_from_parallel(compiled, keep_fp32_wrapper=False, keep_torch_compile=through == "compiled")
    assert prunes(getattr(found, "_orig_mod", found)) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16]


def test_hooks_of_accelerate_around_an_optimised_model() -> None:
    model = fresh("llava", RATIO)
    add_hook_to_module(model, ModelHook())
    assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16]
    hawk_compile.optimize(model, ratio=0.75, backend="eager")  # the hook stays
    assert hasattr(model, "_old_forward") and prunes(model)
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [8]
    remove_hook_from_module(model)
    assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [8]
    hawk_compile.restore(model)
    assert not prunes(model) and "forward" not in model.__dict__


def test_a_hook_that_outlives_restore() -> None:
    model = fresh("llava", RATIO)
    add_hook_to_module(model, ModelHook())
    hawk_compile.restore(model)
    assert not prunes(model)
    assert model(**picture("llava")).logits.equal(plain("llava")(**picture("llava")).logits)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    assert prunes(model)


def test_a_hook_that_was_there_before_and_is_removed() -> None:
    """It puts back what lay beneath the hook, which is ours: pruning goes on."""
    model = zoo.build("llava", layers=2)
    add_hook_to_module(model, ModelHook())
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16]
    remove_hook_from_module(model)
    assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16]
    hawk_compile.restore(model)
    assert not prunes(model)


@pytest.mark.parametrize("how", ["del", "own"])
def test_a_forward_of_others(how: str) -> None:
    model = fresh("llava", RATIO)
    model(**picture("llava"))
    if how == "del":
        del model.forward
    else:
        model.forward = types.MethodType(type(model).forward, model)
    with pytest.raises(HawkError, match=GONE):
        hawk_compile.report(model)
    out = model(**picture("llava"))
    with pytest.raises(HawkError, match="that none has"):
        hawk_compile.report(out)
    theirs = model.__dict__.get("forward")
    hawk_compile.restore(model)
    assert model.__dict__.get("forward") is theirs  # what is not ours stays
    if how == "own":
        hawk_compile.optimize(model, ratio=RATIO, backend="eager")
        model.forward = theirs
        with pytest.warns(UserWarning, match="others have replaced forward of .* so nothing was pruned since"):
            hawk_compile.optimize(model, ratio=RATIO, backend="eager")
        assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16]


def test_wrappers_of_every_kind_are_seen_through() -> None:
    for wrap in (wrapped_by_closure, functools.partial, CallableObject, torch.no_grad()):
        model = fresh("llava", RATIO)
        model.forward = wrap(model.forward)
        assert prunes(model) and hawk_compile.report(model).kept_visual_tokens.tolist() == [16], wrap


def wrapped_by_closure(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


class CallableObject:
    def __init__(self, function: Any):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def test_what_generate_needs_is_replaced() -> None:
    """Its private hooks: another conversation's positions would be used, or a prompt be cut before it is scored."""
    model = fresh("llava", RATIO)
    generate(model, picture("llava"), 1)
    model._prefill = types.MethodType(type(model)._prefill, model)
    with pytest.raises(HawkError, match="others have replaced _prefill of the model after optimize"):
        hawk_compile.report(model)
    with pytest.warns(UserWarning, match="others have replaced _prefill of the model"):
        hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    generate(model, picture("llava"), 1)
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [16]


def test_own_generate_is_left_alone() -> None:
    """Others replace generate by loops of their own on purpose: the prefill prunes in them too."""
    model = fresh("llava", RATIO)
    model.generate = types.MethodType(lambda self, **kwargs: self(**kwargs), model)
    model.generate(**picture("llava"))
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [16]


def test_optimize_twice_and_copies_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = zoo.build("llava", layers=2)
    before = state(model)
    for _ in range(2):
        hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    twin = copy.deepcopy(model)
    assert prunes(twin) and hawk_compile.report(twin).kept_visual_tokens.tolist() == [16]
    hawk_compile.optimize(twin, ratio=RATIO, backend="eager")
    assert not [each for each in recwarn if "replaced" in str(each.message)]
    hawk_compile.restore(model)
    assert state(model) == before


def test_a_forward_that_makes_up_attributes_is_told_from_ours() -> None:
    """A mock has any attribute that is asked for, and each is another mock."""
    model = fresh("llava")
    model.forward = unittest.mock.MagicMock()
    with pytest.raises(HawkError, match="forward was replaced"):
        hawk_compile.report(model)


@torch.no_grad()
def test_another_class_and_another_body() -> None:
    """Given after `optimize`: the new ones are run, pruned and reported, and nothing of ours stays behind `restore`."""
    model = fresh("llava", RATIO)
    kind: Any = type(model)

    class Halved(kind):
        @functools.wraps(kind.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    expected = model(**picture("llava")).logits
    model.__class__ = Halved
    torch.testing.assert_close(model(**picture("llava")).logits, expected / 2)
    assert hawk_compile.report(model).kept_tokens == expected.shape[1]
    model.model = copy.deepcopy(plain("llava").model)
    torch.testing.assert_close(model(**picture("llava")).logits, expected / 2)
    assert hawk_compile.report(model).kept_tokens == expected.shape[1]
    hawk_compile.restore(model)
    assert {*state(model)} == {*state(zoo.build("llava", layers=2))}
    assert not prunes(model)
