"""The prefill that is inspected: one row with one image (or one audio, for a model that only hears), on meta."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from hawk_compile.capture.diagnosis import user_stack
from hawk_compile.capture.features import EXTRA_ROWS, FEATURES, LAYER_FEATURES
from hawk_compile.capture.modalities import positions_by_images
from hawk_compile.capture.prefill import CapturedPrefill, capture_prefill
from hawk_compile.errors import CaptureError
from hawk_compile.kernels.plan.op import slots
from hawk_compile.runtime.positions import axes_of
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.inspection.without_weights import META


def captured(
    model: PreTrainedModel, config: HawkConfig, length: int, visual: int, modality: str
) -> CapturedPrefill:
    """One prompt's prefill, its features in the structure that the model expects.

    Raises:
        CaptureError: it cannot be captured in any; of the structures, the one that came furthest is told of.
    """
    refusals: list[CaptureError] = []
    for outputs in encoder_outputs(model, visual):
        inputs = prompt(model, length) | {"mm_encoder_outputs": {modality: outputs}}
        try:
            return capture_prefill(model, inputs, None, plan_arguments(model, config, length, visual))
        except CaptureError as error:
            refusals.append(error)
    raise max(refusals, key=depth)


def depth(error: CaptureError) -> int:
    """How deep in the model's calls a capture ended."""
    return len(user_stack(error.__cause__)) if error.__cause__ else 0


def encoder_outputs(model: PreTrainedModel, visual: int) -> list[ModelOutput]:
    """Encoded images, in the two structures that models expect: a list of [V, D], and one [1, V, D]."""
    weight = embedding_weight(model)
    vision = getattr(model.config, "vision_config", None)
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def features() -> Tensor:
        return torch.empty((visual + EXTRA_ROWS, weight.shape[1]), dtype=weight.dtype, device=META)

    kind: type[ModelOutput] = BaseModelOutputWithPooling
    more: dict[str, Any] = {}
    if levels:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        kind = BaseModelOutputWithDeepstackFeatures
        more = {LAYER_FEATURES: [[features()] for _ in range(levels)]}
    structures = ([features()], features().unsqueeze(0))
    return [kind(**{FEATURES: structure}, **more) for structure in structures]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, D]; its dtype is that of the features."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def prompt(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """The other arguments of a prefill of one row without padding."""
    ids = torch.zeros((1, length), dtype=torch.long, device=META)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if positions_by_images(model):
        given["position_ids"] = ids.expand(axes_of(model), 1, length).clone()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = ids.clone()
    return given


def plan_arguments(model: PreTrainedModel, config: HawkConfig, length: int, visual: int) -> tuple[Tensor | None, ...]:
    """The arguments of `hawk::plan` for one row: the mask [1, S], a budget [1], weights [H], S', V', and more."""
    kept = config.bounds(visual, config.floor(visual))[1]
    weights = torch.empty(model.config.get_text_config().num_attention_heads, device=META)
    question_mask = torch.zeros((1, length), dtype=torch.bool, device=META)
    budget = torch.zeros(1, dtype=torch.long, device=META)
    places = torch.zeros((1, length), dtype=torch.long, device=META)
    least = budget.clone() if config.budget is not None else None
    image, floor = (places, places.clone()) if config.per_image else (None, None)
    return question_mask, budget, weights, *slots(length - visual + kept, kept, META), None, least, image, floor
