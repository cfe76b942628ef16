"""Weights and modules that change after `optimize`: what is compiled reads them as they are, held to a plain model that
is changed alike and pruned by hand. One model goes through all changes, so that stale graphs would be met."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hawk_compile
from tests import zoo
from tests.runtime.models import RATIO, ROUNDING, picture
from tests.runtime.reference import Conversation


def layer(model: Any) -> Any:
    return model.base_model.get_decoder().layers[0]


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def in_place(model: Any) -> None:
    for weight in (layer(model).self_attn.k_proj.weight, layer(model).input_layernorm.weight, model.lm_head.weight):
        weight.data.add_(noise(weight, 1))


def replaced(model: Any) -> None:
    attention = layer(model).self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach() + noise(attention.q_proj.weight, 2))


def module_replaced(model: Any) -> None:
    attention = layer(model).self_attn
    biased = nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features)
    biased.weight.data.copy_(noise(biased.weight, 3) * 3)
    biased.bias.data.copy_(noise(biased.bias, 4) * 3)
    attention.k_proj = biased


def loaded(model: Any, assign: bool = False) -> None:
    model.load_state_dict(
        {name: value + noise(value, 5 + assign) if value.is_floating_point() else value
         for name, value in model.state_dict().items()}, assign=assign,
    )  # fmt: skip


def assigned(model: Any) -> None:
    loaded(model, assign=True)


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def emptied_and_filled(model: Any) -> None:
    def tensors() -> dict[str, torch.Tensor]:  # the state dict lacks buffers that are not persistent
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    before = {name: value.detach().clone() for name, value in tensors().items()}
    model.to_empty(device="cpu")
    for name, value in tensors().items():
        value.copy_(before[name])


def resized(model: Any) -> None:
    torch.manual_seed(6)
    model.resize_token_embeddings(zoo.common.VOCAB + 8)


def attending_otherwise(model: Any) -> None:
    model.set_attn_implementation("eager")


def trained_between(model: Any) -> None:
    model.train()
    model.eval()


def shared(model: Any) -> None:
    model.share_memory()


CHANGES: list[Callable[[Any], None]] = [
    in_place, replaced, module_replaced, loaded, assigned, frozen, emptied_and_filled, resized,
    attending_otherwise, trained_between, shared,
]  # fmt: skip


def check(model: Any, other: Any, what: str) -> None:
    """A pruned model against a plain one, which is pruned by hand: logits, and those of a step."""
    inputs = picture("llava")
    by_hand = Conversation(other, RATIO)
    expected = by_hand.prompt(inputs)
    torch.testing.assert_close(model(**inputs).logits[0], expected, **ROUNDING, msg=lambda text: f"{what}: {text}")
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out[0, -2:].tolist() == by_hand.greedy(2), what


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_changed_after_optimize(backend: str) -> None:
    other = zoo.build("llava", layers=2)
    model = hawk_compile.optimize(copy.deepcopy(other), ratio=RATIO, backend=backend, compile_decode=True)
    check(model, other, "as it was")
    for change in CHANGES if backend == "inductor" else (in_place, replaced, module_replaced, assigned, resized):
        with torch.no_grad():
            change(model), change(other)
        check(model, other, change.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_after_optimize(dtype: torch.dtype) -> None:
    model = hawk_compile.optimize(zoo.build("llava", layers=2), ratio=RATIO, backend="eager")
    model(**picture("llava"))
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in picture("llava").items()}
    found = model.to(dtype)(**inputs).logits
    fresh = hawk_compile.optimize(zoo.build("llava", layers=2).to(dtype), ratio=RATIO, backend="eager")
    assert found.dtype == dtype and found.equal(fresh(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_an_adapter_merged_and_unmerged_after_optimize(backend: str) -> None:
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        zoo.build("llava", layers=2),
        peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False, r=4),
    ).eval()
    other = copy.deepcopy(adapted)
    inner = hawk_compile.optimize(adapted.base_model.model, ratio=RATIO, backend=backend)
    check(inner, other.base_model.model, "adapted")
    for name in ("merge_adapter", "unmerge_adapter"):
        getattr(adapted, name)(), getattr(other, name)()
        check(inner, other.base_model.model, name)
    check(adapted.merge_and_unload(), other.merge_and_unload(), "merge_and_unload")


def test_a_forward_that_is_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of kernels do, for the models that are there already too: of a layer's part, and back again."""
    name = "llava"
    model, alone = zoo.build(name, layers=1), zoo.build(name, layers=1)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    kind = type(layer(model).mlp)
    before, compiled = kind.forward, []
    forwards = {"own": before, "halved": lambda self, x: 0.5 * before(self, x), "own again": before}
    with torch.no_grad():
        for what, forward in forwards.items():
            monkeypatch.setattr(kind, "forward", forward)
            check(model, alone, what)
            compiled.append(model._hawk_runtime.prefill.compilations)
    assert len({*compiled}) == 1  # anew each time, and not twice
