"""The encoders of images, video and audio, which depend on sizes and so run before the prefill's graph.

Their features enter the graph as `mm_encoder_outputs`. Encoded audio, for which models have no such argument, enters in
place of the frames, and the model's `get_audio_features` hands it on, see `patches`.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hawk_compile.capture.features import FEATURES
from hawk_compile.capture.modalities import AUDIO, PER_TOKEN_INPUTS, raw_modalities
from hawk_compile.compat.models import run_encoders_of


def run_encoders(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the encoders: pixels and frames leave the arguments, `mm_encoder_outputs` enters them.

    Models whose positions depend on image sizes (mRoPE) get their position_ids here, while those sizes are at hand;
    all others count positions in their own forward, as they would without us.
    """
    kwargs = {**kwargs, "mm_encoder_outputs": dict(kwargs.get("mm_encoder_outputs") or {})}
    base: Any = model.base_model
    if kwargs.get("position_ids") is None and hasattr(base, "compute_3d_position_ids"):
        kwargs["position_ids"] = positions_of(base, kwargs)
    if AUDIO in raw_modalities(kwargs) and hasattr(base, "get_audio_features"):
        kwargs = encode_audio(base, kwargs)
    return run_encoders_of(model, kwargs)  # type: ignore[operator]


def encode_audio(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run the audio encoder: what only it takes leaves the arguments, features [V, D] enter `mm_encoder_outputs`."""
    wanted = inspect.signature(type(base).get_audio_features).parameters
    given = {name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
    output = base.get_audio_features(**given, return_dict=True)
    features = output.get(FEATURES)
    features = output.last_hidden_state if features is None else features
    encoded = BaseModelOutputWithPooling(pooler_output=[features.flatten(0, -2)])  # type: ignore[arg-type]
    left = {name: value for name, value in kwargs.items() if name not in given or name in PER_TOKEN_INPUTS}
    return {**left, "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], AUDIO: encoded}}


def positions_of(base: Any, kwargs: dict[str, Any]) -> Tensor | None:
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = kwargs["input_ids"].new_empty((*kwargs["input_ids"].shape, 0))
    given = {"past_key_values": None, "attention_mask": None, **kwargs, "inputs_embeds": embeds}
    if given.get("feature_attention_mask") is not None:
        given["audio_feature_lengths"] = given["feature_attention_mask"].sum(1)
    wanted = inspect.signature(base.compute_3d_position_ids).parameters
    return base.compute_3d_position_ids(**{name: given.get(name) for name in wanted})
