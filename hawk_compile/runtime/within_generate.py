"""What generate calls of an optimised model in front of its forward: what makes its cache, its masks, its positions and
the inputs of each step, its prefill, and what drafts for it."""

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import create_masks_for_generate

from hawk_compile.capture.features import features_fit
from hawk_compile.capture.images import images_apart
from hawk_compile.capture.modalities import modalities_of, positions_by_images
from hawk_compile.compat.models import (
    CANDIDATES,
    PREFILL,
    PREPARE_CACHE,
    PREPARE_POSITIONS,
    compile_settings_of,
    mask_length_of,
)
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.cached_images import encode
from hawk_compile.runtime.conversation import note, physical_length
from hawk_compile.runtime.drafting import OF_TEXT, begin_behind_prompt, refuse_drafts
from hawk_compile.runtime.generation import generation_of, holding, step_options
from hawk_compile.runtime.later_images import positions_of_later_turn
from hawk_compile.runtime.originals import looks_like, original
from hawk_compile.runtime.positions import deltas_of
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.tracked import TrackedCache, opened, physical_mask

PREPARE_INPUTS = "prepare_inputs_for_generation"
"""(input_ids, **model_kwargs) -> the arguments of generate's next forward."""


def prunes(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt of generate holds what the settings ask to prune."""
    runtime = model.__dict__.get(RUNTIME)
    return runtime is not None and bool(modalities_of(model, kwargs) & set(runtime.config.modalities))


@functools.cache
def inputs_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """What makes the inputs of each step of generate, by which its forwards are known."""

    def prepare_inputs_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        inputs = original(self, PREPARE_INPUTS)(*args, **kwargs)
        if (generation := generation_of(self)) is not None:
            made = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
            generation.made = tuple(weakref.ref(each) for each in made if isinstance(each, Tensor))
        return inputs

    return looks_like(prepare_inputs_for_generation, kind.prepare_inputs_for_generation)  # type: ignore[attr-defined]


def masks_for_generate(self: PreTrainedModel, *, is_first_iteration: bool = False, **kwargs: Any) -> Any:
    """For caches of fixed size generate builds masks ahead: not for a prompt, whose length will change."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if is_first_iteration:
        return mask
    if isinstance(cache, TrackedCache):
        kwargs["attention_mask"] = physical_mask(cache, mask, kwargs["inputs_embeds"].shape[1])
    build = getattr(type(self), "create_masks_for_generate", create_masks_for_generate)
    with opened(cache):
        return build(is_first_iteration=is_first_iteration, **kwargs)


def compiled_call(self: PreTrainedModel, compile_config: CompileConfig | None) -> Any:
    """What generate calls where it compiles decoding (static caches on CUDA): the step inside, compiled by the same
    options, instead of this wrapper."""
    options = (compile_config or compile_settings_of(self)).to_dict()

    def call(*args: Any, **kwargs: Any) -> Any:
        with holding(step_options, options):
            return self(*args, **kwargs)

    return call


def prepare_cache(
    self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
    max_cache_length: int,
) -> None:  # fmt: skip
    """generate's cache. One of fixed size that it makes itself, for this call alone, may be smaller after pruning.

    A prompt that is pruned is prefilled at once, `prefill_chunk_size` or not: its chunks cannot be scored, and generate
    allocates the cache ahead for them. The settings are generate's own copy.
    """
    given = model_kwargs.get("past_key_values")
    if generation_config.prefill_chunk_size is not None and prunes(self, model_kwargs):
        warnings.warn(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} is passed over: a prompt that is pruned is "
            "prefilled at once, since its chunks cannot be scored; leave it out",
            stacklevel=2,
        )
        generation_config.prefill_chunk_size = None
    original(self, PREPARE_CACHE)(
        generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    cache = model_kwargs.get("past_key_values")
    if given is None and isinstance(cache, StaticCache) and generation_config.max_cache_len is None:
        note(cache, asked_length=max_cache_length)


def position_ids_for_generation(self: PreTrainedModel, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Positions with the offsets of this conversation, not of the one that used the model last."""
    cache = model_kwargs.get("past_key_values")
    if physical_length(cache) and positions_by_images(self) and modalities_of(self, model_kwargs):
        return positions_of_later_turn(self, inputs_tensor, model_kwargs)
    with deltas_of(self, cache):
        return original(self, PREPARE_POSITIONS)(inputs_tensor, model_kwargs)


def prefill_whole(
    self: PreTrainedModel, input_ids: Tensor, generation_config: Any, model_kwargs: Any, **kwargs: Any
) -> Any:
    """generate's prefill, which must see the whole prompt at once to score it.

    A model that drafts for another is shown the images of its prompt too, which transformers leaves out there.
    """
    first = "is_first_iteration"
    shown, cache = kwargs.get(first, True), model_kwargs.get("past_key_values")
    if not shown and not physical_length(cache) and prunes(self, model_kwargs) and features_fit(self, model_kwargs):
        kwargs[first] = shown = True
    if generation_config.use_cache is False and shown and prunes(self, model_kwargs):
        generation = generation_of(self)
        if generation is not None:
            generation.prompt_length = input_ids.shape[1]
    return original(self, PREFILL)(input_ids, generation_config, model_kwargs, **kwargs)


def encode_images(self: PreTrainedModel, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The vision encoder, and the features of each image apart if the settings ask of images."""
    runtime, frames = self.__dict__.get(RUNTIME), model_kwargs.get("video_grid_thw")
    encoded = encode(self, None if runtime is None else runtime.images, model_kwargs)
    if runtime is not None and runtime.config.per_image and encoded.get("mm_encoder_outputs"):
        outputs = encoded["mm_encoder_outputs"]
        counted = {name: output for name, output in outputs.items() if name in runtime.config.modalities}
        encoded = {**encoded, "mm_encoder_outputs": {**outputs, **images_apart(self, counted, frames)}}
    return encoded


def candidate_generator(
    self: PreTrainedModel, *, generation_config: Any, input_ids: Tensor, model_kwargs: dict[str, Any], **kwargs: Any
) -> Any:
    """What drafts tokens for assisted decoding: behind the prompt, see `hawk_compile.runtime.drafting`."""
    pruning, filled = prunes(self, model_kwargs), physical_length(model_kwargs.get("past_key_values")) > 0
    if pruning or filled:
        refuse_drafts(self, generation_config)
        whole = mask_length_of(generation_config, model_kwargs) == input_ids.shape[1]
        model_kwargs = {name: value for name, value in model_kwargs.items() if name in OF_TEXT}
    generator = original(self, CANDIDATES)(
        generation_config=generation_config, input_ids=input_ids, model_kwargs=model_kwargs, **kwargs
    )
    if pruning or filled:
        generation = generation_of(self)
        if generation is None:
            raise UnsupportedCallError(
                "assisted decoding of a prompt with images, or on a cache that already holds tokens, needs the "
                "generate that optimize has put on the model, and another was called: call model.generate"
            )
        begin_behind_prompt(self, generator, input_ids, generation.inputs, generation.question, shown=not filled)
        generation.repeats = filled and whole
    return generator
