"""Encoded features in the structure that the prefill's graph takes: neither the number of images nor their sizes are
part of it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hawk_compile.capture.modalities import AUDIO, AUDIO_INPUT, MERGED_BY_NAME, raw_inputs
from hawk_compile.compat.models import AUDIO_LENGTHS
from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.kernels.compat import check

FEATURES = "pooler_output"
UNPOOLED = "last_hidden_state"
LAYER_FEATURES = "deepstack_features"
FIELDS = (FEATURES, UNPOOLED, LAYER_FEATURES)
EXTRA_ROWS = 2


def field_of(output: ModelOutput) -> str:
    """The field of an encoder's output in which a model looks for what it merges: where it pools nothing (or projects
    the features itself), the last hidden states; where each decoder layer adds features of its own, those.

    Raises:
        UnsupportedModelError: there is no such field.
    """
    held = dict(output) if isinstance(output, ModelOutput) else {}
    found = next((name for name in FIELDS if held.get(name) is not None), None)
    if found is None:
        raise UnsupportedModelError(
            f"the model's encoder gives {type(output).__name__}({', '.join(held)}), and its features are looked for in "
            f"{', '.join(FIELDS)} of a ModelOutput: call hawk_compile.restore(model) to run the model whole"
        )
    return found


def features_of(output: ModelOutput) -> Any:
    """The features of all images for the merge: one tensor [..., D], or several; those of the first decoder layer that
    takes some, where each takes its own."""
    field = field_of(output)
    return output[field] if field != LAYER_FEATURES else of_level(output[field][0])


def of_level(level: Any) -> Any:
    """The features of one later layer, which may stand behind that layer's number."""
    return level[1] if is_numbered(level) else level


def is_numbered(level: Any) -> bool:
    return isinstance(level, tuple) and len(level) == 2 and isinstance(level[0], int)


def fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for another call: a forward writes into the features that it is given."""
    outputs = kwargs.get("mm_encoder_outputs")
    if outputs is None:
        return kwargs
    return {**kwargs, "mm_encoder_outputs": {name: type(each)(**each) for name, each in outputs.items() if each}}


def join_features(outputs: dict[str, Any]) -> dict[str, ModelOutput]:
    """The features of each modality in a structure that does not depend on the number of images.

    A model that gets one tensor expects one ([1, V, D], or [V, D]); one that gets a list joins it itself ([[V, D]]).
    """
    joined = {}
    for modality, output in outputs.items():
        if output is None:
            continue
        field, parts = field_of(output), {}
        if not isinstance(features_of(output), Tensor) and not features_of(output):
            raise InputError(
                f"mm_encoder_outputs holds no features of {modality}s when the prefill begins: give what is to be "
                "encoded, or what an encoder made of it. Where a prompt is repeated, transformers loses features that "
                "have no placeholder id of their own: leave out num_beams and num_return_sequences there"
            )
        if field != LAYER_FEATURES:
            parts[field] = join(output[field])
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [of_layer(level, join) for level in output[LAYER_FEATURES]]
        joined[modality] = class_for(type(output))(**parts)
    return joined


def of_layer(level: Any, change: Any) -> Any:
    """The features of one later layer, changed, behind that layer's number if they stand there."""
    return (level[0], change(level[1])) if is_numbered(level) else change(level)


def class_for(kind: Any) -> type[ModelOutput]:
    """The class of an output, or a wider one where that cannot be made of its features alone."""
    required = [part for part in dataclasses.fields(kind) if part.default is dataclasses.MISSING]
    return BaseModelOutputWithPooling if required else kind


def join(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
    parts = [features] if isinstance(features, Tensor) else list(features)
    dims, width = parts[0].ndim, parts[0].shape[-1]
    # Two rows more, cut off again inside the graph: Dynamo specialises a size of 1, and an image may be one token.
    rows = [part.reshape(-1, width) for part in parts]
    joined = torch.cat([*rows, rows[0].new_zeros(EXTRA_ROWS, width)])
    joined = joined.view(*[1] * (dims - 2), *joined.shape)
    return joined if isinstance(features, Tensor) else [joined]


def cut_extra_rows(outputs: dict[str, ModelOutput]) -> dict[str, ModelOutput]:
    """The features as `join_features` was given them; traced into the graph.

    Features for later layers are as many as those for the merge; the capture is told so, so that both are V.
    """
    cut = {}
    for modality, output in outputs.items():
        field, parts = field_of(output), {}
        if field != LAYER_FEATURES:
            parts[field] = without_extra(output[field])
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [of_layer(level, without_extra) for level in output[LAYER_FEATURES]]
            levels = [of_level(level) for level in parts[LAYER_FEATURES]]
            merged = levels[0] if field == LAYER_FEATURES else parts[field]
            for level in levels:
                check(count_in(level) == count_in(merged))
        cut[modality] = type(output)(**parts)
    return cut


def count_in(features: Tensor | list[Tensor]) -> Any:
    """V of joined features."""
    return (features if isinstance(features, Tensor) else features[0]).shape[-2]


def without_extra(features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(features, Tensor):
        return features[..., :-EXTRA_ROWS, :]
    return [part[..., :-EXTRA_ROWS, :] for part in features]


def by_argument(model: PreTrainedModel, outputs: dict[str, ModelOutput]) -> dict[str, ModelOutput]:
    """The features of each modality; audio by the argument that its frames have. See `arguments_of`."""
    return {raw_inputs(model)[AUDIO][0] if name == AUDIO else name: output for name, output in outputs.items()}


def arguments_of(outputs: dict[str, ModelOutput]) -> dict[str, Any]:
    """The arguments under which a model's forward takes encoder outputs: audio in place of its frames, see `encode`.

    Args:
        outputs: by modality; audio by the argument that its frames have, or by modality where that is the usual one.
    """
    seen = {name: output for name, output in outputs.items() if name in MERGED_BY_NAME}
    given: dict[str, Any] = {"mm_encoder_outputs": seen} if seen else {}
    for name, output in outputs.items():
        if name not in MERGED_BY_NAME:
            given[AUDIO_INPUT if name == AUDIO else name] = output[FEATURES][0]
    return given


def features_fit(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether features that are encoded already, by whichever model, are as wide as this one's embeddings."""
    width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
    outputs = [output for output in (kwargs.get("mm_encoder_outputs") or {}).values() if output is not None]
    features = [features_of(output) for output in outputs]
    parts = [part for found in features for part in ([found] if isinstance(found, Tensor) else found)]
    return all(part.shape[-1] == width for part in parts)


def feature_count(model: PreTrainedModel, kwargs: dict[str, Any], outputs: dict[str, ModelOutput]) -> int:
    """The number of feature rows over all modalities: of `outputs`, each of joined structure, and of audio in `kwargs`.

    Raises:
        InputError: audio that is encoded in the graph, without the argument that says how long it is.
    """
    count = sum(count_in(features_of(output)) - EXTRA_ROWS for output in outputs.values())
    if kwargs.get(AUDIO_INPUT) is None:
        return count
    frames = kwargs.get("feature_attention_mask")
    if frames is None:
        raise InputError(
            "input_features were given without feature_attention_mask [audios, frames], which says how long each audio "
            "is: give what the model's processor returns"
        )
    tower: Any = model.base_model.audio_tower
    return count + int(getattr(tower, AUDIO_LENGTHS)(frames.sum(-1))[1].sum())
