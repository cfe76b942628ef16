"""What a cache holds of the tokens before, as tensors by name: what exported components hand on.

    key_L, value_L                        layer L's keys and values [B, Hkv, P, d]
    extra_key_L                           the keys of its indexer [B, P, d]
    conv_state_L_N, recurrent_state_L_N   its states, which have no length; N where a layer has several
"""

import re
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hawk_compile.compat.models import EXTRA_KEYS, EXTRA_POSITIONS
from hawk_compile.errors import ExportError
from hawk_compile.runtime.handover import scratch_layers

KEY, VALUE, EXTRA_KEY = "key_{}", "value_{}", "extra_key_{}"
STATES = {"conv_states": "conv_state_{}_{}", "recurrent_states": "recurrent_state_{}_{}"}
"""An attribute of layers -> the names of what it holds, by layer and number."""
TOLD = {"conv_states": "is_conv_states_initialized", "recurrent_states": "is_recurrent_states_initialized"}
"""Where layers say that they hold something."""
PAST = "past_"
"""How the inputs of the decode step are called that hold what the step before gave."""
LENGTHS = {"key": 2, "value": 2, "extra_key": 1}
"""Kinds of tensors that hold something for each token, and along which dimension."""
KINDS = (
    "DynamicLayer", "DynamicIndexedLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer",
)  # fmt: skip
"""Layers of transformers whose tensors these are all; older releases have no DummyLayer."""


def check_cache(model: PreTrainedModel) -> None:
    """Refuse a model whose cache keeps what has no name here.

    Raises:
        ExportError: names the layers.
    """
    kinds = sorted({type(layer).__name__ for layer in scratch_layers(model)} - {*KINDS})
    if kinds:
        raise ExportError(
            f"{type(model).__name__} cannot be exported: its cache has layers of the kind {' and '.join(kinds)}, and "
            "the components of an export hand on keys, values, an indexer's keys and linear attention's states alone; "
            "run the model with hawk_compile.optimize"
        )


def check_window(model: PreTrainedModel) -> None:
    """Refuse a model whose attention has no window and whose cache has: a step would see more than the model's own.

    Raises:
        ExportError: says which setting of the config contradicts which.
    """
    config: Any = model.config.get_text_config()
    if getattr(config, "use_sliding_window", None) is not False:
        return
    if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers):
        raise ExportError(
            f"{type(model).__name__} cannot be exported: by its config, attention has no window "
            f"(use_sliding_window=False), and yet its cache drops all but the last tokens "
            f"(sliding_window={config.sliding_window}), which an export keeps: set sliding_window=None in its text "
            "config, or run the model with hawk_compile.optimize"
        )


def is_held(name: str) -> bool:
    """Whether a tensor of this name is a cache's."""
    return re.fullmatch(r"(key|value|extra_key)_\d+|(conv|recurrent)_state_\d+_\d+", name) is not None


def length_dim(name: str) -> int | None:
    """Along which dimension of a cache's tensor the tokens lie; None of states."""
    return LENGTHS.get(name.rpartition("_")[0])


def held_by(cache: Cache) -> dict[str, Tensor]:
    """The tensors of a cache by name.

    Raises:
        ExportError: a layer that keeps the positions of its indexer's keys too.
    """
    named: dict[str, Any] = {}
    for number, layer in enumerate(cache.layers):
        if getattr(layer, EXTRA_POSITIONS, None) is not None:
            raise ExportError(
                f"layer {number} of the cache keeps positions beside an indexer's keys, which the components of an "
                "export do not hand on; run the model with hawk_compile.optimize"
            )
        for form, attribute in ((KEY, "keys"), (VALUE, "values"), *((EXTRA_KEY, name) for name in EXTRA_KEYS)):
            if (tensor := getattr(layer, attribute, None)) is not None:
                named[form.format(number)] = tensor
        for attribute, form in STATES.items():
            states = getattr(layer, attribute, {})
            named |= {form.format(number, each): state for each, state in states.items() if state is not None}
    return named


def fill(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Let a cache that holds nothing, with layers of the model's kinds or none yet, hold these tensors."""
    numbers = sorted(int(name.rpartition("_")[2]) for name in tensors if name.startswith(KEY.format("")))
    for number in numbers:
        cache.update(tensors[KEY.format(number)], tensors[VALUE.format(number)], number)
    for number, layer in enumerate(cache.layers):
        for name, method in EXTRA_KEYS.items():
            if hasattr(layer, name) and (keys := tensors.get(EXTRA_KEY.format(number))) is not None:
                getattr(layer, method)(keys)
    replace(cache, {name: tensor for name, tensor in tensors.items() if length_dim(name) is None})


def replace(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of what a cache holds by the same names; states also where it holds none."""
    for number, layer in enumerate(cache.layers):
        for form, attribute in ((KEY, "keys"), (VALUE, "values"), *((EXTRA_KEY, name) for name in EXTRA_KEYS)):
            if form.format(number) in tensors and hasattr(layer, attribute):
                setattr(layer, attribute, tensors[form.format(number)])
        for attribute, form in STATES.items():
            for each in getattr(layer, attribute, {}):
                if (state := tensors.get(form.format(number, each))) is not None:
                    put_state(layer, attribute, each, state)


def put_state(layer: Any, attribute: str, each: int, state: Tensor) -> None:
    """A copy, since a step writes states in place."""
    getattr(layer, attribute)[each] = state.clone()
    getattr(layer, TOLD[attribute])[each] = layer.has_previous_state[each] = True
    layer.dtype, layer.device = state.dtype, state.device
    if attribute == "conv_states":
        layer.conv_kernel_size[each] = state.shape[-1]
