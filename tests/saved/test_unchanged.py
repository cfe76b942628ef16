"""What a model must still be for its loaded graphs to answer; all else is compiled anew."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from hawk_compile.saved.unchanged import Unchanged
from tests import zoo


def decoder(model: Any) -> Any:
    return model.base_model.get_decoder()


def layer(model: Any) -> Any:
    return decoder(model).layers[0]


def hooked(model: Any) -> None:
    layer(model).mlp.register_forward_hook(lambda module, args, output: output * 2)


def biased(model: Any) -> None:
    layer(model).mlp.up_proj.bias = nn.Parameter(torch.ones(layer(model).mlp.up_proj.out_features))


def cast(model: Any) -> None:
    layer(model).mlp.double()


def untied_norm(model: Any) -> None:
    layer(model).input_layernorm = copy.deepcopy(layer(model).input_layernorm)


def forward_of_its_own(model: Any) -> None:
    layer(model).mlp.forward = lambda values: values


def attribute(model: Any) -> None:
    layer(model).self_attn.scaling *= 2


def rope_settings(model: Any) -> None:
    decoder(model).config.rope_parameters["rope_theta"] = 1.0


def list_in_a_config(model: Any) -> None:
    model.config.get_text_config().layer_types[0] = "sliding_attention"


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": hooked,
    "train": lambda model: model.train(),
    "train of a part": lambda model: layer(model).mlp.train(),
    "bias": biased,
    "dtype": cast,
    "frozen": lambda model: model.requires_grad_(False),
    "module": untied_norm,
    "forward": forward_of_its_own,
    "number": attribute,
    "new attribute": lambda model: setattr(layer(model).mlp, "gate", 1),
    "config": lambda model: setattr(model.config.get_text_config(), "rms_norm_eps", 0.5),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "a dictionary in a config": rope_settings,
    "a list in a config": list_in_a_config,
    "class of the model's head": lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)),
    "fewer layers": lambda model: decoder(model).layers.__delitem__(0),
    "buffer": lambda model: decoder(model).rotary_emb.register_buffer("inv_freq", torch.ones(3)),
    "method over its class": lambda model: setattr(model, "get_input_embeddings", lambda: None),
    "autocast": lambda model: torch.set_autocast_enabled("cpu", True),
    "deterministic": lambda model: torch.use_deterministic_algorithms(True),
    "default dtype": lambda model: torch.set_default_dtype(torch.float64),
}


@pytest.fixture
def model() -> Any:
    yield zoo.build("qwen2_5_vl", layers=2)
    torch.set_autocast_enabled("cpu", False)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_is_another(model: Any, change: str) -> None:
    before = Unchanged(model)
    assert before.still()
    CHANGES[change](model)
    assert not before.still()


def test_code_that_is_replaced_is_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of kernels do: a class's forward, a function of the model's file, an attention."""
    file = sys.modules[type(layer(model).self_attn).__module__]
    before = Unchanged(model)
    with monkeypatch.context() as patched:
        patched.setattr(type(layer(model).mlp), "forward", lambda self, values: values)
        assert not before.still()
    assert before.still()
    with monkeypatch.context() as patched:
        patched.setattr(file, "rotate_half", lambda values: values)
        assert not before.still()
    assert before.still()
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)
    assert not before.still()


@torch.no_grad()
def test_weights_of_other_numbers_and_places_are_the_same_model(model: Any) -> None:
    before = Unchanged(model)
    layer(model).mlp.up_proj.weight.mul_(2)
    layer(model).mlp.up_proj.weight = nn.Parameter(layer(model).mlp.up_proj.weight + 1)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    decoder(model).layers[1].mlp.down_proj.weight.data = torch.zeros_like(decoder(model).layers[1].mlp.down_proj.weight)
    model.train()
    model.eval()
    assert before.still()


def test_what_calls_leave_on_a_model_changes_nothing(model: Any) -> None:
    with torch.no_grad():
        before = Unchanged(model)
        inputs = zoo.inputs("qwen2_5_vl", model, rows=[zoo.sizes("qwen2_5_vl")[0]])
        model.generate(**inputs, max_new_tokens=2)
        model(**inputs)
        assert before.still()
        model.noted = "by somebody"
        assert before.still()
