"""What an optimised model shadows: its forward, and the methods by which generate prepares and steps."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import create_masks_for_generate

from hawk_compile.capture.modalities import modalities_of
from hawk_compile.capture.patches import body_overrides
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.conversation import PrunedCache, physical_length, physical_mask
from hawk_compile.runtime.forward import DECODE_OPTIONS, run
from hawk_compile.runtime.positions import deltas_of
from hawk_compile.runtime.prefill import PROMPT_LENGTH

RUNTIME = "_hawk_runtime"


def overrides_of(model: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """Each attribute that an optimised model shadows: name -> (the module it is put on, what is put there)."""
    found: dict[str, tuple[Any, Any]] = {
        "forward": (model, types.MethodType(forward_of(type(model)), model)),  # type: ignore[arg-type]
        "create_masks_for_generate": (model, types.MethodType(masks_for_generate, model)),
        "get_compiled_call": (model, types.MethodType(compiled_call, model)),
        "_prepare_cache_for_generation": (model, types.MethodType(prepare_cache, model)),
        "_prepare_position_ids_for_generation": (model, types.MethodType(position_ids_for_generation, model)),
        "_prefill": (model, types.MethodType(prefill_whole, model)),
        "_get_candidate_generator": (model, types.MethodType(candidate_generator, model)),
        "_prepare_multimodal_encoder_kwargs_for_generation": (model, types.MethodType(encode_images, model)),
    }
    found |= {name: (model.base_model, method) for name, method in body_overrides(model).items()}
    return found


def prunes(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt of generate holds what the settings ask to prune."""
    return bool(modalities_of(kwargs) & set(model.__dict__[RUNTIME].config.modalities))


def original(model: PreTrainedModel, name: str) -> Any:
    """A method of the model as it is without `optimize`."""
    runtime = model.__dict__.get(RUNTIME)
    if runtime is None:
        return getattr(model, name)
    originals = runtime.originals
    return originals[name] if name in originals else getattr(type(model), name).__get__(model)


@functools.cache
def forward_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward of optimised models of one class; its signature is that of the class.

    A torch.compile around the whole model leaves it alone: it compiles what can be compiled itself.
    """
    signature = inspect.signature(kind.forward)
    rest = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)

    @torch.compiler.disable(reason="an optimised model compiles its own prefill")
    @functools.wraps(kind.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        named = signature.bind(self, *args, **kwargs).arguments
        more = named.pop(str(rest), {})
        named = {**named, **more}
        del named[next(iter(named))]  # self
        return run(self, self.__dict__[RUNTIME], original(self, "forward"), named)

    return forward


def masks_for_generate(self: PreTrainedModel, *, is_first_iteration: bool = False, **kwargs: Any) -> Any:
    """For caches of fixed size generate builds masks ahead: not for a prompt, whose length will change."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if is_first_iteration:
        return mask
    if isinstance(cache, PrunedCache):
        kwargs["attention_mask"] = physical_mask(cache, mask, kwargs["inputs_embeds"].shape[1])
    build = getattr(type(self), "create_masks_for_generate", create_masks_for_generate)
    return build(is_first_iteration=is_first_iteration, **kwargs)


def compiled_call(self: PreTrainedModel, compile_config: CompileConfig | None) -> Any:
    """What generate calls where it compiles decoding (static caches on CUDA): the step inside, compiled by the same
    options, instead of this wrapper."""
    options = (compile_config or self._default_compile_config()).to_dict()
    return functools.partial(self.__call__, **{DECODE_OPTIONS: options})


def prepare_cache(
    self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
    max_cache_length: int,
) -> None:  # fmt: skip
    """generate's cache. One of fixed size that it makes itself, for this call alone, may be smaller after pruning."""
    given = model_kwargs.get("past_key_values")
    original(self, "_prepare_cache_for_generation")(
        generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    cache = model_kwargs.get("past_key_values")
    if given is None and isinstance(cache, StaticCache) and generation_config.max_cache_len is None:
        cache.hawk_asked_length = max_cache_length  # type: ignore[attr-defined]


def position_ids_for_generation(self: PreTrainedModel, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Positions with the offsets of this conversation, not of the one that used the model last."""
    with deltas_of(self, model_kwargs.get("past_key_values")):
        return original(self, "_prepare_position_ids_for_generation")(inputs_tensor, model_kwargs)


def prefill_whole(
    self: PreTrainedModel, input_ids: Tensor, generation_config: Any, model_kwargs: Any, **kwargs: Any
) -> Any:
    """generate's prefill, which must see the whole prompt at once to score it."""
    if generation_config.prefill_chunk_size is not None and prunes(self, model_kwargs):
        raise UnsupportedCallError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size} cuts the prompt before its visual tokens can "
            "be scored against the question: leave it out"
        )
    cache = model_kwargs.get("past_key_values")
    if prunes(self, model_kwargs) and physical_length(cache) and hasattr(self.base_model, "rope_deltas"):
        raise UnsupportedCallError(
            "new images on a cache that already holds tokens: in models with mRoPE generate gives them positions of "
            "text, so prefill the whole conversation at once, or call the model with position_ids of your own"
        )
    if generation_config.use_cache is False and prunes(self, model_kwargs):
        model_kwargs[PROMPT_LENGTH] = input_ids.shape[1]  # every step prefills anew, with what was generated so far
    return original(self, "_prefill")(input_ids, generation_config, model_kwargs, **kwargs)


def encode_images(self: PreTrainedModel, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The vision encoder, compiled if the settings ask for that."""
    runtime = self.__dict__[RUNTIME]
    with runtime.vision.encoding(self) if runtime.config.compile_vision else contextlib.nullcontext():
        return original(self, "_prepare_multimodal_encoder_kwargs_for_generation")(model_kwargs)


def candidate_generator(self: PreTrainedModel, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
    """What drafts tokens for assisted decoding, whose first draft stands behind the prompt before it is prefilled."""
    if prunes(self, model_kwargs):
        raise UnsupportedCallError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens and the like) puts drafted tokens into the "
            "prefill, where they would vote on the visual tokens: leave it out for prompts with images, videos or audio"
        )
    if isinstance(model_kwargs.get("past_key_values"), PrunedCache):
        raise UnsupportedCallError(
            "assisted decoding runs the whole conversation again behind what the cache holds: leave it out in later "
            "turns"
        )
    return original(self, "_get_candidate_generator")(*args, model_kwargs=model_kwargs, **kwargs)
