"""Calls that a pruned prefill does not support: each is refused before anything has run."""

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer
from transformers.utils import ModelOutput

from hawk_compile.capture.features import LAYER_FEATURES
from hawk_compile.capture.indexers import counts_slots
from hawk_compile.capture.modalities import asks_for, token_kinds, tokens_of
from hawk_compile.capture.signatures import takes_encoded
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.positions import axes_of

OF_TOKENS = ("attention_mask", "mm_token_type_ids", "token_type_ids")
"""Arguments that say something of every token of the prompt, which models index by one another."""
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments of transformers' models that say where prompts begin within a row."""


def refuse_other_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedCallError(
            f"past_key_values must be a cache of transformers, got {type(cache).__name__}: give a DynamicCache"
        )


def refuse_other_prompt(kwargs: dict[str, Any]) -> None:
    """Refuse what is no batch of prompts, or a mask or positions of another batch."""
    tokens = tokens_of(kwargs)
    name, dims = ("input_ids", 2) if kwargs.get("inputs_embeds") is None else ("inputs_embeds", 3)
    if not isinstance(tokens, Tensor) or tokens.ndim != dims or tokens.is_floating_point() != (dims == 3):
        wanted = "integers [B, S]" if dims == 2 else "floats [B, S, D]"
        raise InputError(
            f"{name} must be a tensor of {wanted}, got {said(tokens)}: give what the model's processor returns, with "
            'return_tensors="pt"'
        )
    mask, positions, rows = kwargs.get("attention_mask"), kwargs.get("position_ids"), tokens.shape[0]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] != rows:
        raise InputError(
            f"attention_mask must have a row for each of the {rows} prompts, got shape {tuple(mask.shape)}: give the "
            "one that the model's processor returns"
        )
    past, length = physical_length(kwargs.get("past_key_values")), tokens.shape[1]
    for name in () if past else OF_TOKENS:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] != length:
            raise InputError(
                f"{name} must have shape [B, {length}] like the prompt, got {tuple(value.shape)}: give the one that "
                "the model's processor returns"
            )
    if positions is not None and not (isinstance(positions, Tensor) and positions.ndim in (2, 3)):
        raise InputError(
            f"position_ids must be [B, S], or [axes, B, S] where positions have axes, got {said(positions)}: leave "
            "them out, or give them so"
        )


def said(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def refuse_unsupported(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    refuse_other_prompt(kwargs)
    if kwargs.get("labels") is not None:
        raise UnsupportedCallError(
            "labels were given to a pruned prefill, whose logits no longer line up with them: hawk_compile.restore the "
            "model to train or to compute a loss"
        )
    if model.training:
        raise UnsupportedCallError(
            "the model is in training mode, and a pruned prefill has no gradients: call model.eval(), or "
            "hawk_compile.restore it to train"
        )
    if asks_for(model, kwargs, "output_attentions"):
        raise UnsupportedCallError(
            "output_attentions=True needs attention matrices, which a pruned prefill does not make: leave it out, or "
            "hawk_compile.restore the model"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCallError(
            f"attention_mask must have shape [B, S] for a pruned prefill, got {given}: give the one that the model's "
            "processor returns"
        )
    if kwargs.get("inputs_embeds") is not None and not takes_encoded(model):
        raise UnsupportedCallError(
            f"inputs_embeds were given beside images or audio, which {type(model).__name__} merges into "
            "input_ids only: give input_ids [B, S]"
        )
    refuse_packed_rows(model, kwargs)
    cache = kwargs.get("past_key_values")
    if physical_length(cache) and (names := token_kinds(model, kwargs)):
        raise UnsupportedCallError(
            f"new images on a cache that already holds tokens cannot attend both ways ({' and '.join(names)} were "
            "given): prefill the whole conversation at once"
        )


def refuse_packed_rows(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse several prompts in one row, told apart by where each begins: a pruned prefill scores one prompt a row.

    Without a mask and a cache, transformers reads that off the positions. They are looked at in such calls alone, since
    it takes a word from the device.
    """
    given = [name for name in PACKING if kwargs.get(name) is not None]
    positions, use_cache = kwargs.get("position_ids"), kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(model.config.get_text_config(), "use_cache", True)
    if not given and isinstance(positions, Tensor) and not use_cache and all(
        kwargs.get(name) is None for name in ("attention_mask", "past_key_values")
    ):
        if positions.ndim == 3:  # those of text stand ahead of the axes'; without them nothing tells
            positions = positions[0] if positions.shape[0] > axes_of(model) else None
        if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            given = ["position_ids that begin anew in the middle of a row"]
    if given:
        raise UnsupportedCallError(
            f"{' and '.join(given)} were given, which pack several prompts into one row, and a pruned prefill scores "
            "one prompt a row: give each a row of its own, padded, with attention_mask [B, S]"
        )


def refuse_other_layers(cache: Cache, layers: tuple[Any, ...]) -> None:
    """Refuse a filled cache from which the graph's own cannot be filled.

    Args:
        layers: of the cache that the graph fills, empty; none where they are plain.
    """
    kinds = [type(layer) for layer in layers] or [DynamicLayer] * len(cache.layers)
    held = [type(layer) for layer in cache.layers]
    if held != kinds and (layers or {*held} != {StaticLayer}):
        names = sorted({type(layer).__name__ for layer in cache.layers})
        raise UnsupportedCallError(
            f"new images on a cache that already holds tokens need {needed_cache(kinds)}, got {', '.join(names)}: "
            "prefill the whole conversation at once"
        )


def needed_cache(kinds: list[type]) -> str:
    if set(kinds) == {DynamicLayer}:
        return "a DynamicCache or StaticCache of plain layers"
    return f"a DynamicCache without windows, of {' and '.join(sorted({kind.__name__ for kind in kinds}))}"


def refuse_fillers_behind_states(layers: tuple[Any, ...]) -> None:
    """Refuse rows that have to be filled up behind what a cache holds, where that is a state."""
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UnsupportedCallError(
            "new images on a cache that already holds tokens, in rows that are of unequal length once pruned: this "
            "model's layers keep states, which what fills a row up between the old tokens and the new ones would "
            "change. Give the rows one by one, each with a cache of its own, or prefill the whole conversation at once"
        )


def refuse_padding_among_blocks(model: PreTrainedModel) -> None:
    """Refuse padded rows, and rows that have to be filled up, where an indexer counts blocks of keys by slots."""
    if any(counts_slots(module) for module in model.modules()):
        raise UnsupportedCallError(
            f"rows of unequal length: {type(model).__name__} attends to blocks of keys that it counts from the first "
            "slot, so that what pads a row moves its blocks, pruned or not: give the rows one by one"
        )


def refuse_two_kinds_of_layer_features(outputs: dict[str, ModelOutput]) -> None:
    if len(outputs) > 1 and any(output.get(LAYER_FEATURES) is not None for output in outputs.values()):
        raise UnsupportedCallError(
            f"{' and '.join(outputs)} in one call: this model adds features of both to later layers, which the graph "
            "cannot tell apart; give them in separate calls"
        )


def refuse_quotas_of_audio(asked: set[str]) -> None:
    if "audio" in asked:
        raise UnsupportedCallError(
            "min_per_image, quota and normalize_per are of images and frames, and audio competes with them for one "
            'budget: leave them out, or "audio" out of modalities'
        )
