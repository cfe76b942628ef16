"""An optimised model goes through pickle, torch.save, copy and to other processes, and is there what it was here."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import LlavaForConditionalGeneration

import hawk_compile
from hawk_compile import selectors
from tests import zoo
from tests.marks import slow
from tests.runtime import pickled
from tests.runtime.models import LAYERS, fresh, generate, picture, pruned
from tests.runtime.test_optimize import state

WEIGHTS = (1.0, 3.0, 2.0, 0.5)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [
    by_pickle, *slow(by_torch, copy.deepcopy, copy.copy)
])
def test_prunes_alike_and_is_restored(through: Any) -> None:
    model = fresh("llava", head_weights=WEIGHTS)
    twin = through(model)  # before its first call: hooks that LLaVA's records hidden states by cannot be pickled
    again = through(twin)
    expected = model(**picture("llava")).logits
    assert twin._hawk_runtime is not model._hawk_runtime and twin.forward.__self__ is twin
    torch.testing.assert_close(twin(**picture("llava")).logits, expected, rtol=0, atol=0)
    here, there = hawk_compile.report(model), hawk_compile.report(twin)
    assert here.keep_indices[0].equal(there.keep_indices[0]) and there.head_weights == here.head_weights == "given"
    assert generate(twin, picture("llava"), 2).sequences.equal(generate(model, picture("llava"), 2).sequences)
    hawk_compile.optimize(twin, ratio=0.75, backend="eager")
    twin(**picture("llava"))
    assert hawk_compile.report(twin).kept_visual_tokens.tolist() == [8]
    hawk_compile.restore(twin)
    assert {*state(twin)} == {*state(zoo.build("llava", layers=LAYERS))}
    if through is not copy.copy:  # which shares the modules, and so what is put on them
        torch.testing.assert_close(again(**picture("llava")).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(model(**picture("llava")).logits, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_after_calls() -> None:
    model = fresh("qwen2_5_vl")
    out = generate(model, picture("qwen2_5_vl"), 3)
    twin = by_pickle(model)
    assert all(map(torch.equal, generate(twin, picture("qwen2_5_vl"), 3).logits, out.logits))
    with pytest.raises(hawk_compile.HawkError, match="has run no prefill"):
        hawk_compile.report(by_pickle(model))


def test_a_restored_model_is_pickled_as_one_that_never_was_optimised() -> None:
    model = zoo.build("llava", layers=LAYERS)
    before = pickle.dumps(model)
    assert len(pickle.dumps(hawk_compile.restore(hawk_compile.optimize(model, ratio=0.5)))) == len(before)
    with hawk_compile.pruned(model, ratio=0.5, backend="eager"):
        inside = by_pickle(model)
    assert len(pickle.dumps(model)) == len(before) and b"hawk" not in pickle.dumps(model)
    assert inside(**picture("llava")).logits.shape[1] < picture("llava")["input_ids"].shape[1]


@pytest.mark.parametrize("settings", [
    {"selector": selectors.IDPruner(importance=0.3)}, {"selector": "divprune"}, {"budget": hawk_compile.Adaptive(0.9)},
    {"quota": "image", "min_per_image": 4},
], ids=str)  # fmt: skip
def test_settings_travel(settings: dict[str, Any]) -> None:
    model = fresh("llava", **settings)
    here, there = model._hawk_runtime, by_pickle(model)._hawk_runtime
    assert repr(there.config) == repr(here.config) and repr(there.config.method) == repr(here.config.method)
    assert there.prefill.options == here.prefill.options and there.ids == here.ids
    assert there.head_weights.values.equal(here.head_weights.values)


@pytest.mark.slow
def test_what_others_put_beneath_is_there_again() -> None:
    """A method of others that pickle can take apart runs inside still, and is there when the model is restored."""
    model = zoo.build("llava", layers=LAYERS)
    model.forward = Counted(model)
    twin = by_pickle(hawk_compile.optimize(model, ratio=0.6, backend="eager"))
    torch.testing.assert_close(twin(**picture("llava")).logits, pruned("llava")(**picture("llava")).logits)
    hawk_compile.restore(twin)
    assert isinstance(twin.__dict__["forward"], Counted) and twin.forward.calls and twin.forward.model is twin


class Counted:
    """A forward of others."""

    __signature__ = inspect.signature(LlavaForConditionalGeneration.forward)

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return type(self.model).forward(self.model, *args, **kwargs)


@pytest.mark.slow
def test_copies_of_a_model_with_hooks() -> None:
    model = zoo.build("llava", layers=LAYERS)
    add_hook_to_module(model, ModelHook())
    hawk_compile.optimize(model, ratio=0.5, backend="eager")
    copy.deepcopy(model)(**picture("llava"))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture(name: str) -> None:
    twin = by_pickle(fresh(name))
    out, expected = generate(twin, picture(name), 3), generate(pruned(name), picture(name), 3)
    assert all(map(torch.equal, out.logits, expected.logits))
    hawk_compile.restore(twin)
    assert {*state(twin)} == {*state(zoo.build(name, layers=LAYERS))}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_processes(start: str) -> None:
    """Of LLaVA's kind, not even the plain model records hidden states in a process that has not made one itself."""
    model = fresh("qwen2_5_vl")
    model.share_memory()
    expected = pruned("qwen2_5_vl")(**picture("qwen2_5_vl"))
    kept = hawk_compile.report(pruned("qwen2_5_vl")).kept_visual_tokens.tolist()
    results = torch.multiprocessing.get_context(start).SimpleQueue()
    context = torch.multiprocessing.start_processes(
        pickled.answer, (model, picture("qwen2_5_vl"), results), nprocs=1, join=False, start_method=start
    )
    while not context.join():  # which raises what was raised there
        pass
    logits, seen = results.get()
    torch.testing.assert_close(torch.tensor(logits), expected.logits[0, -1])
    assert seen == kept
