"""What an optimised model shadows: its forward, generate and what generate calls, and the saving of it."""

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from hawk_compile.capture.features import features_fit
from hawk_compile.capture.images import images_apart
from hawk_compile.capture.modalities import modalities_of, placeholder_ids, positions_by_images
from hawk_compile.capture.patches import body_overrides, definer
from hawk_compile.capture.segments import name_of_rest
from hawk_compile.capture.signatures import signature_of
from hawk_compile.compat.models import (
    CANDIDATES,
    PREFILL,
    PREPARE_CACHE,
    PREPARE_ENCODERS,
    PREPARE_POSITIONS,
    REPLICATE,
    UPLOAD,
    compile_settings_of,
    mask_length_of,
)
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime.asked import QUESTION_ARGUMENTS, take_question
from hawk_compile.runtime.conversation import note, physical_length
from hawk_compile.runtime.drafting import OF_TEXT, begin_behind_prompt, refuse_drafts
from hawk_compile.runtime.forward import run
from hawk_compile.runtime.generation import Generation, generating, running
from hawk_compile.runtime.later_images import positions_of_later_turn
from hawk_compile.runtime.originals import looks_like, original
from hawk_compile.runtime.parts import HandedOn, class_of, handing_on, text_forward_of, text_part
from hawk_compile.runtime.positions import deltas_of
from hawk_compile.runtime.prefill import run_prefill
from hawk_compile.runtime.saving import save_of, upload
from hawk_compile.runtime.split import placed
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.surroundings import watchers_around
from hawk_compile.runtime.tracked import TrackedCache, opened, physical_mask, refuse_spoiled
from hawk_compile.runtime.wholes import refuse_speech

Overrides = dict[str, tuple[nn.Module, types.MethodType]]
"""Name of an attribute, with the part's in front where it is one of a part -> (the module it is put on, what is put
there)."""


def overrides_of(model: PreTrainedModel) -> Overrides:
    """Each attribute that an optimised model shadows."""
    kind: Any = type(model)
    made: dict[str, Callable[..., Any]] = {
        "forward": forward_of(definer(kind, "forward")),
        "generate": generate_of(definer(kind, "generate")),
        "save_pretrained": save_of(definer(kind, "save_pretrained")),
        "create_masks_for_generate": masks_for_generate,
        "get_compiled_call": compiled_call,
        PREPARE_CACHE: prepare_cache,
        PREPARE_POSITIONS: position_ids_for_generation,
        PREFILL: prefill_whole,
        CANDIDATES: candidate_generator,
        PREPARE_ENCODERS: encode_images,
        UPLOAD: upload,
        REPLICATE: refuse_replica,
    }
    overrides: Overrides = {name: (model, types.MethodType(function, model)) for name, function in made.items()}
    if (inner := text_part(model)) is not None:
        name, part = inner
        overrides[f"{name}.forward"] = (
            part, types.MethodType(text_forward_of(definer(class_of(part), "forward")), part)
        )
    return overrides | {name: (model.base_model, method) for name, method in body_overrides(model).items()}


def attribute_of(name: str) -> str:
    """The attribute that an override is put on."""
    return name.rpartition(".")[2]


def prunes(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt of generate holds what the settings ask to prune."""
    runtime = model.__dict__.get(RUNTIME)
    return runtime is not None and bool(modalities_of(model, kwargs) & set(runtime.config.modalities))


@functools.cache
def forward_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward of optimised models of one class; its signature is that of the class.

    A torch.compile around the whole model leaves it alone: it compiles what can be compiled itself.
    """
    signature = signature_of(kind)
    rest = name_of_rest(signature)

    @torch.compiler.disable(
        reason="an optimised model compiles its own prefill: leave fullgraph=True out of the torch.compile around it, "
        "or hawk_compile.restore the model"
    )
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self:  # bound twice, see `uninstall`
            args = args[1:]
        runtime = self.__dict__.get(RUNTIME)
        if runtime is None:  # restored, and a wrapper of others around us is still in place
            return original(self, "forward")(*args, **kwargs)
        question = {name: kwargs.pop(name) for name in QUESTION_ARGUMENTS if name in kwargs}
        named = signature.bind(self, *args, **kwargs).arguments
        more = named.pop(str(rest), {})
        named = {**named, **more, **question}
        del named[next(iter(named))]  # self
        return run(self, runtime, original(self, "forward"), named)

    return looks_like(forward, kind.forward)


@functools.cache
def generate_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """generate, whose steps know of one another and of its question, and whose output knows what the prefill did."""

    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        refuse_spoiled(kwargs.get("past_key_values"))  # before positions behind it are worked out
        if prunes(self, kwargs):
            refuse_speech(kwargs)
        generation = Generation(question=take_question(kwargs), inputs=kwargs)
        with generating(generation), handing_on(call_of(self, args, kwargs)):
            output = original(self, "generate")(*args, **kwargs)
        if isinstance(output, ModelOutput):
            output.hawk_record = generation.record  # type: ignore[attr-defined]
        return output

    return looks_like(generate, kind.generate)  # type: ignore[attr-defined]


def call_of(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HandedOn | None:
    """What the language model of a model must know that it lets generate; None for all others.

    Raises:
        UnsupportedCallError: images without ids, which tell where they stand.
        InputError: ids among which no image stands.
    """
    part, runtime = text_part(model), model.__dict__.get(RUNTIME)
    if part is None or runtime is None:
        return None
    given = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs).arguments  # type: ignore[attr-defined]
    if not prunes(model, given):
        return None
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or given.get("inputs_embeds") is not None:
        raise UnsupportedCallError(
            "images were given to generate without input_ids [B, S], or beside inputs_embeds, so that it cannot be "
            "told which tokens are theirs: give what the model's processor returns for images and text"
        )
    if not torch.isin(ids, torch.tensor(placeholder_ids(model), device=ids.device)).any():
        raise InputError(
            f"images were given to generate, but none of their placeholders ({placeholder_ids(model)}) stands in "
            "input_ids: give what the model's processor returns for images and text"
        )
    forward = original(model, "forward")
    return HandedOn(model, part[1], ids, lambda first: run_prefill(model, runtime, forward, placed(model, first)))


def refuse_replica(self: PreTrainedModel) -> Any:
    """What nn.DataParallel copies a module by, to another device for one call.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        "nn.DataParallel copies an optimised model to several devices at every call, and each copy would have to be "
        "compiled anew: run a process for each device (torchrun, DistributedDataParallel), give DataParallel one "
        "device, or hawk_compile.restore the model"
    )


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
        with generating(replace(running.get() or Generation(), step_options=options)):
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
        generation = running.get()
        if generation is not None:
            generation.prompt_length = input_ids.shape[1]
    return original(self, PREFILL)(input_ids, generation_config, model_kwargs, **kwargs)


def encode_images(self: PreTrainedModel, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The vision encoder, compiled if the settings ask for that and no mode is to see each of its operators, and the
    features of each image apart if they ask of images."""
    runtime, frames = self.__dict__.get(RUNTIME), model_kwargs.get("video_grid_thw")
    encode = original(self, PREPARE_ENCODERS)
    if runtime is not None and runtime.config.compile_vision and not watchers_around().any:
        encode = runtime.vision.method(self, encode)
    encoded = encode(model_kwargs)
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
        generation = running.get()
        if generation is None:
            raise UnsupportedCallError(
                "assisted decoding of a prompt with images, or on a cache that already holds tokens, needs the "
                "generate that optimize has put on the model, and another was called: call model.generate"
            )
        begin_behind_prompt(self, generator, input_ids, generation.inputs, shown=not filled)
        generation.repeats = filled and whole
    return generator
