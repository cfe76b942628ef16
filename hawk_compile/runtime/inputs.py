"""The arguments of a prefill, sorted once: what the plan reads, what the cache is told, what the model takes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.encode import positions_of, run_encoders
from hawk_compile.capture.features import join_features
from hawk_compile.capture.images import image_sizes, images_apart
from hawk_compile.capture.modalities import (
    along_prompt,
    positions_by_images,
    raw_modalities,
    read_for_positions,
    required_arguments,
    tokens_of,
)
from hawk_compile.errors import InputError
from hawk_compile.plan.plan import on_host
from hawk_compile.runtime.asked import AskedQuestion, take_question
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.later_images import positions_behind
from hawk_compile.runtime.positions import deltas_after, deltas_of
from hawk_compile.runtime.refusals import refuse_two_kinds_of_layer_features
from hawk_compile.runtime.tracked import TrackedCache, physical_mask

SORTED_OUT = ("mm_encoder_outputs", "past_key_values", "use_cache", "return_dict", "attention_mask")
"""Arguments that are not handed to the model as they were given."""


@dataclass(frozen=True)
class PromptInputs:
    """A prompt of B rows and S positions, its images, videos and audio encoded.

    Attributes:
        arguments: what the model's forward takes as it is, by name: ids or embeddings, positions, everything else that
            was given.
        along: names of those arguments that run along the prompt, [..., B, S], beside the ones every model has.
        features: modality -> what its encoder gave, joined over images; see `join_features`.
        sizes: modality -> tokens of each image or frame; empty unless something is said of single images.
        mask: [B, S], nonzero for real tokens; None if all are.
        on_host: `on_host` of ids and mask; None for a prompt of embeddings.
        past_mask: [B, P] of the cache's slots; None where the cache holds nothing.
        cache: the caller's, or None.
        past: P, slots of the cache that are filled.
        question: what the call says of who votes; None where it says nothing.
        deltas: [B, 1], what the model adds to a text position behind this prompt; None if it adds nothing.
        use_cache, return_dict: as given; None where they were not.
    """

    arguments: dict[str, Any]
    along: tuple[str, ...]
    features: dict[str, ModelOutput]
    sizes: dict[str, list[int]]
    mask: Tensor | None
    on_host: tuple[Tensor, Tensor] | None
    past_mask: Tensor | None
    cache: Cache | None
    past: int
    question: AskedQuestion | None
    deltas: Tensor | None
    use_cache: bool | None
    return_dict: bool | None

    @property
    def tokens(self) -> Tensor:
        """input_ids [B, S] or inputs_embeds [B, S, D], whichever was given."""
        return tokens_of(self.arguments)

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def prompt_inputs(model: PreTrainedModel, kwargs: dict[str, Any], per_image: Collection[str]) -> PromptInputs:
    """Encode what is not encoded yet, and sort the arguments of a call that prunes.

    Args:
        per_image: modalities of which the sizes of single images are needed. Frames are counted on the host, so only
            then.

    Raises:
        InputError: an attention mask of another length than the conversation.
        UnsupportedCallError: features that the graph cannot tell apart.
    """
    kwargs = dict(kwargs)
    question = take_question(kwargs)
    cache, frames = kwargs.get("past_key_values"), kwargs.get("video_grid_thw")
    given = kwargs.get("position_ids") is not None
    if cache is not None and physical_length(cache) and not given and positions_by_images(model):
        kwargs["position_ids"] = positions_behind(model, cache, kwargs)
    rows, length = tokens_of(kwargs).shape[:2]
    past, whole_mask = physical_length(cache), kwargs.get("attention_mask")
    mask, past_mask = split_mask(cache, whole_mask, past, length)
    ids = kwargs.get("input_ids")
    # Before the encoders begin: a device is waited for, and then plans are made while it encodes.
    read = None if ids is None else on_host(ids, mask)
    if raw_modalities(model, kwargs):
        kwargs = encoded_inputs(model, kwargs)
    encoded = kwargs["mm_encoder_outputs"]
    sizes = image_sizes(model, images_apart(model, {each: encoded.get(each) for each in per_image}, frames))
    features = join_features(encoded)
    refuse_two_kinds_of_layer_features(features)
    used_up = {"mm_token_type_ids"} & read_for_positions(model) if kwargs.get("position_ids") is not None else set()
    left_out = {*SORTED_OUT, *used_up}  # a graph with what is read no more would be another one than that without
    arguments = {name: given for name, given in kwargs.items() if name not in left_out and given is not None}
    arguments |= dict.fromkeys(required_arguments(model) - arguments.keys())
    return PromptInputs(
        arguments=arguments,
        along=along_prompt(arguments, rows, length),
        features=features,
        sizes=sizes,
        mask=mask,
        on_host=read,
        past_mask=past_mask,
        cache=cache,
        past=past,
        question=question,
        deltas=deltas_after(model, cache, kwargs.get("position_ids"), whole_mask, rows, length),
        use_cache=kwargs.get("use_cache"),
        return_dict=kwargs.get("return_dict"),
    )


def encoded_inputs(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with encoder outputs in place of pixels and frames, and positions that depend on their sizes."""
    if kwargs.get("position_ids") is None and positions_by_images(model):
        with deltas_of(model, kwargs.get("past_key_values")):
            kwargs = {**kwargs, "position_ids": worked_out_positions(model, kwargs)}
            if kwargs["position_ids"] is None:
                return run_encoders(model, kwargs)
    return run_encoders(model, kwargs)


def worked_out_positions(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor | None:
    """Positions that depend on the sizes of images, or None where the model works out none.

    Raises:
        InputError: the prompt has placeholders of an image whose size is not given.
    """
    try:
        return positions_of(model.base_model, kwargs)
    except StopIteration:  # what models raise where the sizes run out
        raise InputError(
            "the prompt has placeholders of more images or videos than image_grid_thw and video_grid_thw give sizes "
            "of: give the images and videos that belong to exactly these placeholders"
        ) from None


def split_mask(
    cache: Cache | None, mask: Tensor | None, past: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mask of the new tokens [B, S], mask of the cache's slots [B, P] or None if there are none)."""
    if not past:
        return mask, None
    assert cache is not None
    whole = physical_mask(cache, mask, length) if isinstance(cache, TrackedCache) else mask
    if whole is None:
        keys: Any = next(layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None)  # type: ignore[union-attr]
        whole = torch.ones((keys.shape[0], past + length), dtype=torch.long, device=keys.device)
    if whole.shape[1] != past + length:
        raise InputError(
            f"attention_mask must cover the whole conversation, {past + length} positions (cached ones included), got "
            f"shape {tuple(whole.shape)}: give one that is as long"
        )
    return whole[:, past:].contiguous(), whole[:, :past].contiguous()
