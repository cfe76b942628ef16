"""From the compiled prefill to the caller's cache: the graph fills a plain one, whose keys and values are handed on."""

from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel, StaticLayer
from transformers.cache_utils import DynamicLayer

from hawk_compile.runtime.conversation import conversation_of, note, physical_length


def scratch_cache(target: Cache | None) -> DynamicCache:
    """A plain cache for the graph to fill: whatever the caller's kind, one graph serves it."""
    scratch = DynamicCache()
    if physical_length(target):
        for index, layer in enumerate(target.layers):  # type: ignore[union-attr]
            scratch.update(layer.keys, layer.values, index)
    return scratch


def fill_cache(
    model: PreTrainedModel, target: Cache | None, scratch: DynamicCache, past: int, use_cache: bool | None
) -> Cache | None:
    """The caller's cache with the new keys and values; a new one if the model would make one.

    A plain cache takes the scratch cache's tensors as they are, any other copies them by its own `update`.
    """
    config = model.config.get_text_config()
    if target is None:
        if use_cache is False or (use_cache is None and not getattr(config, "use_cache", True)):
            return None
        target = DynamicCache(config=config)
    if is_plain(target) and len(target.layers) in (0, len(scratch.layers)):
        target.layers = scratch.layers
        return target
    for index, layer in enumerate(scratch.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        assert keys is not None and values is not None
        target.update(keys[:, :, past:], values[:, :, past:], index)
    return target


def is_plain(cache: Cache) -> bool:
    """Whether a cache does no more than hold the keys and values of all tokens, layer by layer."""
    kinds: set[Any] = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return kinds == {DynamicLayer} and type(cache).update is Cache.update and not cache.offloading


def shrink(cache: Cache | None, removed: int, least: int) -> int:
    """Let a cache of fixed size that generate made, which holds nothing yet, do without what was removed.

    Args:
        least: slots that it has at least, so that a cache of the next call is not of another size without need.

    Returns:
        The slots of its layers without a sliding window; `least` where there is no such cache.
    """
    asked = conversation_of(cache).asked_length
    if cache is None or asked is None or physical_length(cache):
        return least
    length = max(asked - removed, least)
    lengths = tuple(layer.max_cache_len if isinstance(layer, StaticLayer) else None for layer in cache.layers)
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.max_cache_len = min(layer.max_cache_len, length)
    note(cache, asked_length=None, layer_lengths=lengths)
    return length
