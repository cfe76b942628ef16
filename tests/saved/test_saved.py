"""Compiled graphs in a folder: they answer as the compiled model does, and nothing else is taken for them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from tests import zoo

NAME = "qwen2_5_vl"
BEHIND_A_CACHE = "it goes on with a cache that holds something"


class GoesOn(Exception):
    """Raised where a call would go on to be compiled, which takes long."""


def built(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = zoo.build(NAME, layers=1)
    return hawk_compile.optimize(model, **{"ratio": 0.6, **settings})


def prompt(*which: int) -> dict[str, Any]:
    return zoo.inputs(NAME, zoo.build(NAME, layers=1), rows=[zoo.sizes(NAME)[each] for each in which or (4,)])


def answer(model: Any, inputs: dict[str, Any], tokens: int = 1) -> Any:
    return model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


def logits(model: Any, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    return answer(model, prompt() if inputs is None else inputs).logits[0]


def prefill_of(model: Any) -> Any:
    return model.__dict__["_hawk_runtime"].prefill


@pytest.fixture(scope="module")
def reference() -> Any:
    """Compiled in this process, by the compiler that takes least time. Its weights are those of who used it last."""
    model = built(backend="eager")
    answer(model, prompt())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Path:
    place = tmp_path_factory.mktemp("saved") / "compiled"
    model, stages = built(), []
    one = prefill_of(reference).kinds[0]
    prefill_of(model).kinds = (one, BEHIND_A_CACHE, one)  # as if it had been called itself, in two states
    left_out = hawk_compile.save_compiled(model, place, progress=lambda now: stages.append(now.text))
    assert left_out == [BEHIND_A_CACHE]
    assert stages == ["capturing", "passes", "compiling", f"left out: {BEHIND_A_CACHE}", "saved"]
    return place


@pytest.fixture
def loaded(folder: Path) -> Any:
    """A model with loaded graphs, which compiles nothing."""
    model = built()
    assert hawk_compile.load_compiled(model, folder) == 1

    def goes_on(*args: Any) -> Any:
        raise GoesOn

    prefill_of(model).called = goes_on
    return model


def as_it_should(model: Any, reference: Any, inputs: dict[str, Any] | None = None) -> bool:
    """Whether a loaded graph answers as a compiled one of the same weights."""
    reference.load_state_dict(model.state_dict())
    answered = prefill_of(model).saved.answered
    torch.testing.assert_close(logits(model, inputs), logits(reference, inputs), rtol=1e-5, atol=1e-5)
    return bool(prefill_of(model).saved.answered == answered + 1)


def test_a_loaded_graph_answers_as_the_compiled_model_and_nothing_is_compiled(loaded: Any, reference: Any) -> None:
    """Prompts and images of other sizes, and another ratio."""
    for which, ratio in ((4, 0.6), (0, 0.6), (5, 0.3)):
        hawk_compile.optimize(loaded, ratio=ratio)
        hawk_compile.optimize(reference, ratio=ratio, backend="eager")
        found, expected = (answer(model, prompt(which), tokens=4) for model in (loaded, reference))
        assert found.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        one, other = hawk_compile.report(found), hawk_compile.report(expected)
        assert [rows.tolist() for rows in one.keep_indices] == [rows.tolist() for rows in other.keep_indices]
        assert (one.reason, one.scoring_layer) == (other.reason, other.scoring_layer)
    hawk_compile.optimize(reference, ratio=0.6, backend="eager")
    assert (prefill_of(loaded).compilations, prefill_of(loaded).saved.answered) == (0, 3)


def layer(model: Any) -> Any:
    return model.base_model.get_decoder().layers[0]


def in_place(model: Any) -> None:
    for weight in (layer(model).self_attn.k_proj.weight, layer(model).input_layernorm.weight, model.lm_head.weight):
        weight.mul_(1.5)


def replaced(model: Any) -> None:
    layer(model).self_attn.q_proj.weight = nn.Parameter(layer(model).self_attn.q_proj.weight * 1.5)


def state_loaded(model: Any, assign: bool = False) -> None:
    state = {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def state_assigned(model: Any) -> None:
    state_loaded(model, assign=True)


@pytest.mark.parametrize("change", [in_place, replaced, state_loaded, state_assigned])
def test_weights_that_change_are_seen(loaded: Any, reference: Any, change: Callable[[Any], Any]) -> None:
    before = logits(loaded)
    with torch.no_grad():
        change(loaded)
    assert as_it_should(loaded, reference)
    assert not torch.allclose(logits(loaded), before)


def test_an_adapter_is_compiled_anew_and_merged_it_is_seen(loaded: Any, reference: Any) -> None:
    before = logits(loaded)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, loaded)
    loaded.eval()
    with pytest.raises(GoesOn):
        logits(loaded)
    for name, part in [*loaded.named_modules()]:
        if isinstance(part, peft.tuners.lora.LoraLayer):
            part.merge()
            parent, _, last = name.rpartition(".")
            setattr(loaded.get_submodule(parent), last, part.get_base_layer())
    loaded.requires_grad_(True)  # an adapter freezes what it is put on
    assert as_it_should(loaded, reference)
    assert not torch.allclose(logits(loaded), before)


STALE: dict[str, Callable[[Any], Any]] = {
    "number": lambda model: setattr(layer(model).input_layernorm, "variance_epsilon", 0.5),
    "module": lambda model: setattr(layer(model).mlp, "down_proj", nn.Linear(8, 8)),
    "bias": lambda model: setattr(layer(model).mlp.up_proj, "bias", nn.Parameter(torch.ones(8))),
    "train": lambda model: layer(model).mlp.train(),
    "dtype": lambda model: model.double(),
    "frozen": lambda model: model.requires_grad_(False),
    "forward": lambda model: setattr(layer(model).mlp, "forward", lambda values: values * 2),
    "attention": lambda model: model.set_attn_implementation("eager"),
}  # fmt: skip


@pytest.mark.parametrize("change", STALE)
def test_a_graph_that_has_become_stale_does_not_answer(loaded: Any, change: str) -> None:
    STALE[change](loaded)
    inputs = {name: value.to(loaded.dtype) if value.is_floating_point() else value for name, value in prompt().items()}
    with pytest.raises(GoesOn):
        logits(loaded, inputs)
    assert prefill_of(loaded).saved.answered == 0


def test_a_hook_is_refused_and_without_it_the_graph_answers_again(loaded: Any, reference: Any) -> None:
    del prefill_of(loaded).called
    handle = layer(loaded).mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedCallError, match="hooks"):
        logits(loaded)
    handle.remove()
    assert as_it_should(loaded, reference)


def test_a_forward_that_is_replaced_on_a_class(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(layer(loaded).mlp)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, values: before(self, values) * 2)
    with pytest.raises(GoesOn):
        logits(loaded)


def test_a_graph_answers_in_inference_mode_too(loaded: Any, reference: Any) -> None:
    reference.load_state_dict(loaded.state_dict())
    expected = logits(reference)
    with torch.inference_mode():
        found = logits(loaded)
    torch.testing.assert_close(found.clone(), expected, rtol=1e-5, atol=1e-5)


def test_calls_of_another_kind_are_compiled(loaded: Any, reference: Any) -> None:
    """All logits; a batch with padding; autocast; features of its own; a mode that is to see operators."""
    for given in ({}, {"output_hidden_states": True}):
        with torch.no_grad(), pytest.raises(GoesOn):
            loaded(**prompt(), **given)
    with pytest.raises(GoesOn):
        logits(loaded, prompt(0, 4))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GoesOn):
        logits(loaded)
    assert prefill_of(loaded).saved.answered == 0


def test_what_is_not_served_is_compiled_and_right(loaded: Any, reference: Any) -> None:
    """In the place of a graph that is stale, by the compiler that the settings name."""
    del prefill_of(loaded).called
    prefill_of(loaded).config = prefill_of(reference).config
    norms = [layer(model).input_layernorm for model in (loaded, reference)]
    before = norms[0].variance_epsilon
    for norm in norms:
        norm.variance_epsilon = 0.5
    try:
        assert not as_it_should(loaded, reference)
    finally:
        norms[1].variance_epsilon = before
    assert prefill_of(loaded).compilations == 1


def test_new_settings_that_change_the_graph_and_restore_let_the_graphs_go(folder: Path) -> None:
    model = built()
    hawk_compile.load_compiled(model, folder)
    hawk_compile.optimize(model, ratio=0.3)
    assert prefill_of(model).saved is not None
    assert prefill_of(copy.deepcopy(model)).saved is None
    hawk_compile.optimize(model, ratio=0.3, normalization="softmax")
    assert prefill_of(model).saved is None
    hawk_compile.optimize(model, ratio=0.6)
    hawk_compile.load_compiled(model, folder)
    hawk_compile.optimize(hawk_compile.restore(model), ratio=0.6)
    assert prefill_of(model).saved is None


def test_a_model_with_loaded_graphs_can_go(folder: Path) -> None:
    model = built()
    hawk_compile.load_compiled(model, folder)
    logits(model)
    gone = weakref.ref(model)
    hawk_compile.restore(model)
    del model
    gc.collect()
    assert gone() is None


def test_no_weight_lies_in_the_folder(folder: Path) -> None:
    """Neither as a file nor within the package."""
    model = built()
    assert {each.name for each in folder.iterdir()} == {"manifest.json", "prefill_0.pt2"}
    weights = [weight.detach().contiguous().numpy().tobytes()[:64] for weight in model.parameters()]
    with zipfile.ZipFile(folder / "prefill_0.pt2") as package:
        assert not any(name.endswith((".pkl", ".pt", ".pth", ".pickle")) for name in package.namelist())
        held = [package.read(name) for name in package.namelist()]
    told_apart = [weight for weight in weights if len({*weight}) > 16]
    assert len(told_apart) > 10
    assert not any(weight in content for weight in told_apart for content in held)


def test_threads_answer_side_by_side(loaded: Any, reference: Any) -> None:
    reference.load_state_dict(loaded.state_dict())
    expected = {which: logits(reference, prompt(which)) for which in (0, 4)}
    failures: list[BaseException] = []

    def ask(which: int) -> None:
        try:
            for _ in range(5):
                torch.testing.assert_close(logits(loaded, prompt(which)), expected[which], rtol=1e-5, atol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 4, 0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
