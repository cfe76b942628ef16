"""optimize and restore: what they change on a model, and that nothing else does."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import output_capturing

import hawk_compile
from hawk_compile.capture import patches
from hawk_compile.errors import ConfigError, HawkError
from hawk_compile.runtime import api, travelling
from tests import zoo
from tests.marks import slow
from tests.runtime.models import fresh, generate, picture, plain, pruned


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that lies on the model and on its body, by identity."""
    return {f"{part}.{name}": id(value) for part, module in (("", model), ("base", model.base_model))
            for name, value in module.__dict__.items()}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_restore_gives_the_model_that_it_was(name: str) -> None:
    model = zoo.build(name, layers=2)
    before, kind, signature = state(model), type(model), inspect.signature(model.forward)
    assert hawk_compile.optimize(model, ratio=0.8, backend="eager") is model
    assert type(model) is kind and inspect.signature(model.forward) == signature
    assert state(model) != before
    assert hawk_compile.restore(model) is model
    assert state(model) == before
    assert hawk_compile.restore(model) is model and state(model) == before


@pytest.mark.parametrize("name", [*slow("qwen2_5_vl"), "llava"])
def test_restore_after_use(name: str) -> None:
    model, twin = zoo.build(name, layers=2), zoo.build(name, layers=2)
    generate(model, picture(name), 2)
    generate(twin, picture(name), 2)
    before = {*state(model)}
    hawk_compile.optimize(model, ratio=0.8, backend="eager")
    generate(model, picture(name), 2)
    hawk_compile.restore(model)
    assert {*state(model)} == before
    out, expected = generate(model, picture(name), 4), generate(twin, picture(name), 4)
    assert all(a.equal(b) for a, b in zip(out.logits, expected.logits, strict=True))


def test_optimize_again_replaces_the_settings() -> None:
    model = zoo.build("llava", layers=2)
    before, kept = state(model), []
    for ratio in (0.8, 0.5, 0.25):
        hawk_compile.optimize(model, ratio=ratio, backend="eager")
        model(**picture("llava"))
        kept.append(hawk_compile.report(model).kept_visual_tokens.item())
    assert kept == [7, 16, 24]  # of 32
    hawk_compile.restore(model)
    assert state(model) == before


def test_config_object() -> None:
    config = hawk_compile.HawkConfig(ratio=0.5, backend="eager")
    model = hawk_compile.optimize(zoo.build("llava", layers=2), config)
    model(**picture("llava"))
    assert hawk_compile.report(model).kept_visual_tokens.item() == 16


def test_own_forward_is_kept() -> None:
    """A forward that somebody put on this object (a hook of accelerate, say) runs inside, and is there afterwards."""
    model = zoo.build("llava", layers=2)
    calls = []

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
    own = model.__dict__["forward"]
    hawk_compile.optimize(model, ratio=0.6, backend="eager")
    out = generate(model, picture("llava"), 3)
    assert len(calls) >= 2
    assert out.sequences.equal(generate(pruned("llava"), picture("llava"), 3).sequences)
    hawk_compile.restore(model)
    assert model.__dict__["forward"] is own


@pytest.mark.parametrize("name", ["llava"])
def test_deep_copy_is_independent(name: str) -> None:
    model = fresh(name)
    model.forward  # noqa: B018  bound to the copy's own model below
    twin = copy.deepcopy(model)
    hawk_compile.restore(model)
    out = generate(twin, picture(name), 4)
    assert out.sequences.equal(generate(pruned(name), picture(name), 4).sequences)
    assert generate(model, picture(name), 4).sequences.equal(generate(plain(name), picture(name), 4).sequences)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert twin(**picture(name)).logits.eq(0).all() and not model(**picture(name)).logits.eq(0).any()
    hawk_compile.restore(twin)
    assert {*state(twin)} == {*state(model)}
    assert "forward" not in twin.__dict__
    assert twin(**picture(name)).logits.shape[1] == picture(name)["input_ids"].shape[1]


def test_transformers_is_as_it_was_once_nothing_is_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What optimize changes of transformers for the process lies there while a model needs it: one that got other
    settings, a copy, until it is restored or collected."""

    def unchanged() -> bool:
        return False

    monkeypatch.setattr(output_capturing, "is_torchdynamo_compiling", unchanged)
    users = patches.RecordedByThread()  # of none of the models that other tests hold
    for module in (api, travelling):
        monkeypatch.setattr(module, "recorded_by_thread", users)

    def changed() -> bool:
        return output_capturing.is_torchdynamo_compiling is not unchanged

    first, second = fresh("llava"), fresh("llava")
    hawk_compile.optimize(first, ratio=0.25, backend="eager")
    hawk_compile.restore(second)
    assert changed()
    twin = copy.deepcopy(first)
    hawk_compile.restore(first)
    assert changed()
    hawk_compile.restore(twin)
    assert not changed()
    hawk_compile.optimize(first, ratio=0.5, backend="eager")
    assert changed()
    del first
    gc.collect()
    assert not changed()


def test_what_others_changed_of_transformers_since_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_capturing, "is_torchdynamo_compiling", lambda: False)
    users = patches.RecordedByThread()
    monkeypatch.setattr(api, "recorded_by_thread", users)
    model = fresh("llava")

    def theirs() -> bool:
        return True

    output_capturing.is_torchdynamo_compiling = theirs
    hawk_compile.restore(model)
    assert output_capturing.is_torchdynamo_compiling is theirs


def test_save_pretrained(tmp_path: Path) -> None:
    """An optimised model is saved as an ordinary checkpoint, byte for byte, with its head weights beside it."""
    plain("llava").save_pretrained(tmp_path / "plain")
    pruned("llava").save_pretrained(tmp_path / "pruned")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted([*files, "head_weights.json"]) == sorted(path.name for path in (tmp_path / "pruned").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes(), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned").eval()
    expected = generate(plain("llava"), picture("llava"), 2)
    assert generate(loaded, picture("llava"), 2).sequences.equal(expected.sequences)


def test_report_before_any_prefill() -> None:
    with pytest.raises(HawkError, match=r"call hawk_compile\.optimize first"):
        hawk_compile.report(zoo.build("llava", layers=2))
    with pytest.raises(HawkError, match="the model has run no prefill by these settings yet"):
        hawk_compile.report(fresh("llava"))


def test_one_model_meets_many_structures() -> None:
    """Dynamo gives up after some compilations of one function; a model that meets more kinds of calls must go on."""
    model = fresh("llava")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for options in ({}, {"logits_to_keep": 1}, {"output_hidden_states": True}, {"logits_to_keep": 2}):
            model(**picture("llava"), **options)
    assert model._hawk_runtime.compilations > 2


def test_settings() -> None:
    with pytest.raises(ConfigError, match="unknown setting ration; the settings are ratio, budget"):
        hawk_compile.optimize(plain("llava"), ration=0.5)


def test_an_optimized_model_inside_torch_compile() -> None:
    """What is compiled around the model leaves it alone, and leaves nothing behind."""
    model = fresh("llava")
    inputs = picture("llava")
    expected = model(**inputs).logits
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", isolate_recompiles=True)
        assert torch.equal(compiled(**inputs).logits, expected)
    report = hawk_compile.report(model)
    assert 0 < report.kept_visual_tokens.item() < report.visual_tokens.item()
    assert torch.equal(model(**inputs).logits, expected)
    assert model._hawk_runtime.compilations == 1


def test_a_default_device_of_the_process() -> None:
    """What is planned on the host stays there."""
    model, inputs = zoo.build("llava", layers=2), picture("llava")
    with torch.device("meta"):
        hawk_compile.optimize(model, ratio=0.6, backend="eager")
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, pruned("llava")(**picture("llava")).logits, rtol=0, atol=0)
