"""The prefill that is inspected: one row with one image (or one audio, for a model that only hears)."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.diagnosis import user_stack
from hawk_compile.capture.features import EXTRA_ROWS, FEATURES, LAYER_FEATURES, UNPOOLED, by_argument, class_for
from hawk_compile.capture.modalities import along_prompt, positions_by_images, read_for_positions, required_arguments
from hawk_compile.capture.prefill import CapturedPrefill, capture_prefill
from hawk_compile.errors import CaptureError
from hawk_compile.kernels.plan.op import slots
from hawk_compile.runtime.parts import output_class
from hawk_compile.runtime.positions import axes_of
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.inspection.without_weights import HERE

TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")
"""Arguments [B, S] that say what each token of a prompt is."""


def captured(
    model: PreTrainedModel, config: HawkConfig, length: int, visual: int, modality: str
) -> CapturedPrefill:
    """One prompt's prefill, its features in the structure that the model expects.

    Raises:
        CaptureError: it cannot be captured in any; of the structures, the one that came furthest is told of.
    """
    refusals: list[CaptureError] = []
    given = prompt(model, length)
    along = along_prompt(given, 1, length)
    for output in encoder_outputs(model, modality, visual):
        inputs = given | {"mm_encoder_outputs": by_argument(model, {modality: output})}
        try:
            return capture_prefill(model, inputs, None, plan_arguments(model, config, length, visual), along)
        except CaptureError as error:
            refusals.append(error)
    raise max(refusals, key=depth)


def depth(error: CaptureError) -> int:
    """How deep in the model's calls a capture ended."""
    return len(user_stack(error.__cause__)) if error.__cause__ else 0


def encoder_outputs(model: PreTrainedModel, modality: str, visual: int) -> Iterator[ModelOutput]:
    """An encoded image, video or audio of V = `visual` tokens in all forms that models merge, the most usual first.

    Features stand in one field or the other, as a list of [V, D], one [1, V, D] or one [V, D], beside those of later
    layers. Where a model projects them itself, D is the width of what its projector takes. Of a model in which layers
    alone take features, by their numbers, there is one form.
    """
    kind, weight = class_for(output_class(model, modality)), embedding_weight(model)

    def features(width: int) -> Tensor:
        return torch.empty((visual + EXTRA_ROWS, width), dtype=weight.dtype, device=HERE)

    width = weight.shape[1]
    if numbers := numbered_layers(model):
        yield kind(**{LAYER_FEATURES: [(number, [features(width)]) for number in numbers]})
        return
    later = {LAYER_FEATURES: [[features(width)] for _ in range(later_layers(model))]} if later_layers(model) else {}
    for field, widths in ((FEATURES, [width]), (UNPOOLED, [width, *projected_widths(model)])):
        for taken in dict.fromkeys(widths):
            for structure in ([features(taken)], features(taken).unsqueeze(0), features(taken)):
                yield kind(**{field: structure}, **later)


def later_layers(model: PreTrainedModel) -> int:
    """How many decoder layers, the first ones, add features of their own."""
    return len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def numbered_layers(model: PreTrainedModel) -> list[int]:
    """The decoder layers that take features by their numbers, none where the merge takes them."""
    return [layer for _, layer in getattr(model.config, "deepstack_layer_map", None) or ()]


def projected_widths(model: PreTrainedModel) -> list[int]:
    """What the projectors of a model take that stand beside its encoders and its decoder."""
    parts = [part for part in model.base_model.children() if not isinstance(part, PreTrainedModel)]
    return [part.in_features for each in parts for part in each.modules() if isinstance(part, nn.Linear)]


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """[vocabulary, D]; its dtype is that of the features."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def prompt(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """The other arguments of a prefill of one row without padding."""
    ids = torch.zeros((1, length), dtype=torch.long, device=HERE)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if positions_by_images(model):
        given["position_ids"] = ids.expand(axes_of(model), 1, length).clone()
    for name in TOKEN_KINDS:
        if name in inspect.signature(model.forward).parameters and name not in read_for_positions(model):
            given[name] = ids.clone()
    return given | dict.fromkeys(required_arguments(model) - given.keys())


def plan_arguments(model: PreTrainedModel, config: HawkConfig, length: int, visual: int) -> tuple[Tensor | None, ...]:
    """The arguments of `hawk::plan` for one row: the mask [1, S], a budget [1], weights [H], S', V', and more."""
    kept = config.bounds(visual, config.floor(visual), length - visual)[1]
    weights = torch.empty(model.config.get_text_config().num_attention_heads, device=HERE)
    question_mask = torch.zeros((1, length), dtype=torch.bool, device=HERE)
    budget = torch.zeros(1, dtype=torch.long, device=HERE)
    places = torch.zeros((1, length), dtype=torch.long, device=HERE)
    least = budget.clone() if config.budget is not None else None
    image, floor = (places, places.clone()) if config.per_image else (None, None)
    return question_mask, budget, weights, *slots(length - visual + kept, kept, HERE), None, least, image, floor
