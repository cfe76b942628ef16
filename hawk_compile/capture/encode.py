"""The encoders of images, video and audio, which depend on sizes and so run before the prefill's graph.

Their features enter the graph as `mm_encoder_outputs`. Encoded audio, for which models have no such argument, enters in
place of the frames, and the model's `get_audio_features` hands it on, see `patches`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hawk_compile.capture.features import FEATURES, UNPOOLED
from hawk_compile.capture.merging import encode_in_forward
from hawk_compile.capture.modalities import (
    AUDIO,
    MERGED_BY_NAME,
    PER_TOKEN_INPUTS,
    encoder_of,
    merges_itself,
    positions_by_images,
    raw_inputs,
    raw_modalities,
)
from hawk_compile.compat.models import run_encoders_of
from hawk_compile.errors import UnsupportedCallError

READ_BY_NONE = (FEATURES, UNPOOLED, "hidden_states", "attentions")
"""What an audio encoder gives beside its features and no model merges by."""


def run_encoders(
    model: PreTrainedModel, kwargs: dict[str, Any], encode: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the encoders: pixels and frames leave the arguments, `mm_encoder_outputs` enters them.

    Models whose positions depend on image sizes (mRoPE) get their position_ids here, while those sizes are at hand;
    all others count positions in their own forward, as they would without us.

    Args:
        encode: what encodes images and videos; None: the model's own, which may be compiled.

    Raises:
        UnsupportedCallError: audio whose merge needs more than its features.
        UnsupportedModelError: a model that merges itself, in a way that cannot be seen.
    """
    if merges_itself(model):
        return encode_in_forward(model, kwargs)
    kwargs = {**kwargs, "mm_encoder_outputs": dict(kwargs.get("mm_encoder_outputs") or {})}
    base: Any = model.base_model
    if kwargs.get("position_ids") is None and positions_by_images(model):
        kwargs["position_ids"] = positions_of(base, kwargs)
    raw = raw_modalities(model, kwargs)
    if AUDIO in raw and hasattr(base, "get_audio_features"):
        kwargs = encode_audio(model, kwargs)
    for modality in raw & {*MERGED_BY_NAME}:
        kwargs = by_first_name(model, modality, kwargs)
    kwargs = run_encoders_of(model, kwargs) if encode is None else encode(kwargs)
    for modality in raw_modalities(model, kwargs) & {*MERGED_BY_NAME}:  # videos that the images' encoder takes
        kwargs = encode_frames(model, modality, kwargs)
    return kwargs


def by_first_name(model: PreTrainedModel, modality: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a modality under the name that its encoder has for it, where they have it under another."""
    encode = encoder_of(model, modality)
    first, *others = raw_inputs(model)[modality]
    taken = () if encode is None else inspect.signature(encode).parameters
    if kwargs.get(first) is not None or first not in taken:
        return kwargs
    name = next(other for other in others if kwargs.get(other) is not None)
    if name in taken:
        return kwargs
    return {**{key: value for key, value in kwargs.items() if key != name}, first: kwargs[name]}


def encode_frames(model: PreTrainedModel, modality: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the encoder of one modality, which takes nothing but its frames."""
    encode = encoder_of(model, modality)
    name = next(name for name in raw_inputs(model)[modality] if kwargs.get(name) is not None)
    if encode is None:
        return kwargs
    output = encode(kwargs[name], return_dict=True)
    left = {key: value for key, value in kwargs.items() if key != name}
    return {**left, "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], modality: output}}


def encode_audio(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the audio encoder: what only it takes leaves the arguments, features [V, D] enter `mm_encoder_outputs`."""
    base: Any = model.base_model
    wanted = inspect.signature(type(base).get_audio_features).parameters
    given = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
    output = base.get_audio_features(**given, return_dict=True)
    refuse_more_than_features(model, output)
    features = output.get(FEATURES)
    features = output[UNPOOLED] if features is None else features
    left = {name: value for name, value in kwargs.items() if name not in given or name in PER_TOKEN_INPUTS}
    for name in masks_of(features, left):
        features = features[left.pop(name)]
    encoded = BaseModelOutputWithPooling(pooler_output=[features.flatten(0, -2)])  # type: ignore[arg-type]
    return {**left, "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], AUDIO: encoded}}


def masks_of(features: Tensor, kwargs: dict[str, Any]) -> list[str]:
    """Arguments that the encoder does not take and that say which of its features [audios, tokens, D] are merged."""
    return [
        name for name, value in kwargs.items()
        if name not in PER_TOKEN_INPUTS and isinstance(value, Tensor) and value.dtype == torch.bool
        and features.ndim == 3 and value.shape == features.shape[:2]
    ]  # fmt: skip


def refuse_more_than_features(model: PreTrainedModel, output: Any) -> None:
    more = [part.name for part in dataclasses.fields(output) if part.name not in READ_BY_NONE and part.name in output]
    if more:
        raise UnsupportedCallError(
            f"{type(model).__name__} merges audio by {' and '.join(more)} of its encoder too, which the graph of a "
            "pruned prefill cannot be given: leave the audio out, or hawk_compile.restore the model"
        )


def positions_of(base: Any, kwargs: dict[str, Any]) -> Tensor | None:
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = kwargs["input_ids"].new_empty((*kwargs["input_ids"].shape, 0))
    given = {"past_key_values": None, "attention_mask": None, **kwargs, "inputs_embeds": embeds}
    if given.get("feature_attention_mask") is not None:
        given["audio_feature_lengths"] = given["feature_attention_mask"].sum(1)
    wanted = inspect.signature(base.compute_3d_position_ids).parameters
    return base.compute_3d_position_ids(**{name: given.get(name) for name in wanted})
