"""Prompts whose images are encoded already, and single rows of them, to compare a batch with its rows alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def encoded(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """`inputs` with the vision encoder's outputs in place of pixels, and with the position_ids that generate makes."""
    kwargs: dict[str, Any] = dict(inputs)
    with torch.no_grad():
        kwargs["position_ids"] = model._prepare_position_ids_for_generation(kwargs["input_ids"], kwargs)
        kwargs = model._prepare_multimodal_encoder_kwargs_for_generation(kwargs)
        for modality, output in kwargs["mm_encoder_outputs"].items():
            parts = {
                name: output[name] for name in ("pooler_output", "deepstack_features") if output.get(name) is not None
            }
            kwargs["mm_encoder_outputs"][modality] = type(output)(**parts)
        kwargs = dict(model.prepare_inputs_for_generation(**kwargs, is_first_iteration=True))
    kwargs.pop("mm_token_type_ids", None)
    return kwargs


def row(model: PreTrainedModel, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """One row of encoded inputs, without its padding."""
    real = kwargs["attention_mask"][index].bool()
    single: dict[str, Any] = {}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if kwargs.get(name) is not None:
            single[name] = kwargs[name][index : index + 1, real]
    single["position_ids"] = kwargs["position_ids"][..., index : index + 1, :][..., real]
    features = {}
    for modality, output in kwargs["mm_encoder_outputs"].items():
        token = getattr(model.config, f"{modality}_token_id")
        counts = (kwargs["input_ids"] == token).sum(1).tolist()
        if counts[index]:
            parts = {"pooler_output": rows_of(output["pooler_output"], counts, index)}
            if output.get("deepstack_features") is not None:
                parts["deepstack_features"] = [rows_of(level, counts, index) for level in output["deepstack_features"]]
            features[modality] = type(output)(**parts)
    if features:
        single["mm_encoder_outputs"] = features
    return single


def rows_of(features: Any, counts: list[int], index: int) -> Any:
    joined = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    part = joined.split(counts)[index]
    return part.unsqueeze(0) if isinstance(features, Tensor) else [part]
