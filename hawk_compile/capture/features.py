"""Encoded features in the structure that the prefill's graph takes: neither the number of images nor their sizes are
part of it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.modalities import AUDIO, AUDIO_INPUT
from hawk_compile.compat.models import AUDIO_LENGTHS
from hawk_compile.errors import InputError
from hawk_compile.kernels.compat import check

FEATURES = "pooler_output"
LAYER_FEATURES = "deepstack_features"
EXTRA_ROWS = 2


def fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for another call: a forward writes into the features that it is given."""
    outputs = kwargs.get("mm_encoder_outputs")
    if outputs is None:
        return kwargs
    return {**kwargs, "mm_encoder_outputs": {name: type(each)(**each) for name, each in outputs.items() if each}}


def join_features(outputs: dict[str, Any]) -> dict[str, ModelOutput]:
    """The features of each modality in a structure that does not depend on the number of images.

    A model that gets one tensor expects one ([1, V, D]); a model that gets a list joins it itself ([[V, D]]).
    """
    joined = {}
    for modality, output in outputs.items():
        if output is None:
            continue
        parts: dict[str, Any] = {FEATURES: join(output[FEATURES])}
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [join(level) for level in output[LAYER_FEATURES]]
        joined[modality] = type(output)(**parts)
    return joined


def join(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
    rows = list(features)
    # Two rows more, cut off again inside the graph: Dynamo specialises a size of 1, and an image may be one token.
    joined = torch.cat([*rows, rows[0].new_zeros(EXTRA_ROWS, rows[0].shape[-1])])
    return joined.unsqueeze(0) if isinstance(features, Tensor) else [joined]


def cut_extra_rows(outputs: dict[str, ModelOutput]) -> dict[str, ModelOutput]:
    """The features as `join_features` was given them; traced into the graph.

    Features for later layers are as many as those for the merge; the capture is told so, so that both are V.
    """
    cut = {}
    for modality, output in outputs.items():
        parts: dict[str, Any] = {FEATURES: without_extra(output[FEATURES])}
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [without_extra(level) for level in output[LAYER_FEATURES]]
            for level in parts[LAYER_FEATURES]:
                check(level[0].shape[-2] == parts[FEATURES][0].shape[-2])
        cut[modality] = type(output)(**parts)
    return cut


def without_extra(features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(features, Tensor):
        return features[:, :-EXTRA_ROWS]
    return [part[:-EXTRA_ROWS] for part in features]


def arguments_of(outputs: dict[str, ModelOutput]) -> dict[str, Any]:
    """The arguments under which a model's forward takes encoder outputs: audio in place of its frames, see above."""
    seen = {modality: output for modality, output in outputs.items() if modality != AUDIO}
    given: dict[str, Any] = {"mm_encoder_outputs": seen} if seen else {}
    if AUDIO in outputs:
        given[AUDIO_INPUT] = outputs[AUDIO][FEATURES][0]
    return given


def image_sizes(outputs: dict[str, Any], frames: Tensor | None) -> dict[str, list[int]]:
    """modality -> tokens of each image in the order of the prompts; of a video, of each of its frames.

    Args:
        outputs: of the encoder, one entry of features for each image, tile or video.
        frames: [videos, 3] int64, frames first, where the model packs videos of several sizes; None elsewhere.
    """
    sizes = {name: [len(part) for part in output[FEATURES]] for name, output in outputs.items() if output is not None}
    if frames is not None and "video" in sizes:
        times = frames[:, 0].tolist()
        sizes["video"] = [size // time for size, time in zip(sizes["video"], times, strict=True) for _ in range(time)]
    return sizes


def feature_count(model: PreTrainedModel, kwargs: dict[str, Any], outputs: dict[str, ModelOutput]) -> int:
    """The number of feature rows over all modalities: of `outputs`, each of joined structure, and of audio in `kwargs`.

    Raises:
        InputError: audio that is encoded in the graph, without the argument that says how long it is.
    """
    count = sum(part.shape[-2] - EXTRA_ROWS for output in outputs.values() for part in output[FEATURES])
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
