"""From the compiled prefill to the caller's cache: the graph fills one of plain layers, which are handed on."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticLayer
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from hawk_compile.compat.dynamo import mark_static
from hawk_compile.compat.models import EXTRA_KEYS, EXTRA_POSITIONS, PROMPT_LENGTH
from hawk_compile.errors import UnsupportedCallError, UnsupportedModelError
from hawk_compile.runtime.conversation import conversation_of, note, physical_length

Layers = tuple[Any, ...]


def scratch_layers(model: PreTrainedModel) -> Layers:
    """Empty layers of a cache for the graph to fill, each a plain one where the model's own does no more than hold keys
    and values, if only those of a window. None where all are: a `DynamicCache` makes those itself."""
    own = DynamicCache(config=model.config.get_text_config()).layers
    layers = tuple(without_window(layer) for layer in own)
    return layers if any(type(layer) is not DynamicLayer and keeps_more(layer) for layer in layers) else ()


def first_with_keys(model: PreTrainedModel) -> int:
    """The number of the first decoder layer that keeps keys, and so has the attention that scores."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return next((number for number, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), 0)


def without_window(layer: Any) -> Any:
    """A layer that holds all that this one is given, not only the last of it."""
    if not getattr(layer, "is_sliding", False):
        return layer
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer()


def keeps_more(layer: Any) -> bool:
    """Whether it keeps anything beside keys and values: states, or the keys of an indexer."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) or any(hasattr(layer, name) for name in EXTRA_KEYS)


def scratch_cache(target: Cache | None, layers: Layers = ()) -> DynamicCache:
    """A cache for the graph to fill: whatever the caller's kind, one graph serves it.

    Args:
        layers: `scratch_layers` of the model.
    """
    scratch = DynamicCache()
    filled = physical_length(target)
    if layers:
        scratch.layers = [copied(layer) for layer in (target.layers if filled else layers)]  # type: ignore[union-attr]
    elif filled:
        for index, layer in enumerate(target.layers):  # type: ignore[union-attr]
            scratch.update(layer.keys[:, :, :filled], layer.values[:, :, :filled], index)
    return scratch


def copied(layer: Any) -> Any:
    """A layer that holds the same. States are copies, since a graph writes them in place."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            cloned = {key: of_known_sizes(state.clone()) for key, state in value.items() if isinstance(state, Tensor)}
            vars(twin)[name] = value | cloned
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        twin.record_past = False  # what a prompt ends with is all that later steps may go back to
    return twin


def of_known_sizes(state: Tensor) -> Tensor:
    """A state, of which a graph may take every size but the rows' as a number."""
    mark_static(state, list(range(1, state.ndim)))
    return state


def keep_positions(scratch: DynamicCache, keep: Tensor, past: int, length: int) -> None:
    """Cut what layers remember of the prompt's positions to the kept ones, where the graph hands its input on as it is.

    Args:
        keep: [B, S'], positions within the prompt.
        past: tokens that the layers held before it.
        length: S.
    """
    for layer in scratch.layers:
        held = getattr(layer, EXTRA_POSITIONS, None)
        if held is not None and held.shape[-1] == past + length:
            prompt = held[..., past:]
            kept = prompt.gather(-1, keep.expand(*prompt.shape[:-1], -1))
            setattr(layer, EXTRA_POSITIONS, torch.cat([held[..., :past], kept], -1))


def fill_cache(
    model: PreTrainedModel, target: Cache | None, scratch: DynamicCache, past: int, use_cache: bool | None
) -> Cache | None:
    """The caller's cache with the new keys, values and states; a new one if the model would make one.

    A plain cache takes the scratch cache's layers as they are, any other copies what they hold by its own methods.

    Raises:
        UnsupportedCallError: a cache that cannot hold what the model keeps beside keys and values.
        UnsupportedModelError: layers that hold other numbers of keys.
    """
    refuse_unequal_layers(model, scratch)
    config = model.config.get_text_config()
    if target is None:
        if use_cache is False or (use_cache is None and not getattr(config, "use_cache", True)):
            return None
        target = DynamicCache(config=config)
    if is_plain(target, scratch) and len(target.layers) in (0, len(scratch.layers)):
        for layer, replaced in zip(scratch.layers, target.layers, strict=False):
            if getattr(replaced, "record_past", False):
                layer.record_past = True  # type: ignore[union-attr]
        target.layers = scratch.layers
        return target
    for index, layer in enumerate(scratch.layers):
        fill_layer(target, index, layer, past)
    return target


def refuse_unequal_layers(model: PreTrainedModel, scratch: DynamicCache) -> None:
    """Refuse a cache of which some layers hold the whole prompt: these attend in a way that the passes do not see, in
    front of the layer that scored."""
    held = [
        keys.shape[2] if isinstance(keys := getattr(layer, "keys", None), Tensor) else 0 for layer in scratch.layers
    ]
    if len({*held} - {0}) > 1:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} hold {held} keys of this prompt: those with most attend by neither "
            "scaled_dot_product_attention nor a softmax of queries and keys [B, H, S, d], in front of the layer whose "
            "attention scored. A cache of unequal layers serves no further token: call hawk_compile.restore(model) to "
            "run the model whole"
        )


def fill_layer(target: Cache, index: int, layer: Any, past: int) -> None:
    """Hand on what a layer of the scratch cache holds behind the first `past` tokens, and its states."""
    if getattr(layer, "keys", None) is not None:
        target.update(layer.keys[:, :, past:], layer.values[:, :, past:], index)
    if not keeps_more(layer):
        return
    into = target.layers[index]
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if not isinstance(into, LinearAttentionCacheLayerMixin):
            raise unfit(target, index, "states")
        hand_states(layer, into)
    for name, method in EXTRA_KEYS.items():
        if (keys := getattr(layer, name, None)) is not None:
            if not hasattr(into, method):
                raise unfit(target, index, "the keys of its indexer")
            getattr(into, method)(keys[..., past:, :])
    if getattr(layer, EXTRA_POSITIONS, None) is not None:
        setattr(into, EXTRA_POSITIONS, getattr(layer, EXTRA_POSITIONS))


def unfit(cache: Cache, index: int, what: str) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"layer {index} of this model keeps {what}, for which layer {index} of past_key_values, a "
        f"{type(cache.layers[index]).__name__} of a {type(cache).__name__}, has no place: give a cache made from the "
        "model's text config, as DynamicCache(config=model.config.get_text_config())"
    )


def hand_states(layer: Any, into: Any) -> None:
    """States hold all that came before, so they take the place of the target's."""
    for index in range(layer.number_of_states):
        if layer.is_conv_states_initialized[index]:
            into.has_previous_state[index] = False
            into.update_conv_state(
                layer.conv_states[index], index, conv_kernel_size=layer.conv_kernel_size[index])
        if layer.is_recurrent_states_initialized[index]:
            into.update_recurrent_state(layer.recurrent_states[index], index)


def is_plain(cache: Cache, scratch: DynamicCache) -> bool:
    """Whether a cache does no more than hold all that its layers are given, and these are of the scratch's kinds."""
    own: Any = [type(layer) for layer in cache.layers] or [cache.layer_class_to_replicate]
    kinds = [type(layer) for layer in scratch.layers]
    alike = own == kinds if cache.layers else own == [DynamicLayer]
    return alike and type(cache).update is Cache.update and not cache.offloading


def shrink(cache: Cache | None, removed: int, least: int) -> int:
    """Let a cache that holds nothing yet do without what was removed: one of fixed size that generate made, and layers
    that were told how long the prompt is.

    Args:
        least: slots that it has at least, so that a cache of the next call is not of another size without need.

    Returns:
        The slots of its layers without a sliding window; `least` where there is no such cache.
    """
    if cache is None or physical_length(cache):
        return least
    for layer in cache.layers:
        if (told := getattr(layer, PROMPT_LENGTH, None)) is not None:
            setattr(layer, PROMPT_LENGTH, told - removed)
    asked = conversation_of(cache).asked_length
    if asked is None:
        return least
    length = max(asked - removed, least)
    lengths = tuple(layer.max_cache_len if isinstance(layer, StaticLayer) else None for layer in cache.layers)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.max_cache_len = min(layer.max_cache_len, length)
    note(cache, asked_length=None, layer_lengths=lengths)
    return length
