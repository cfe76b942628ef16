"""What an optimised model shadows: its forward, generate and what generate calls, and the saving of it."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.modalities import placeholder_ids
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
)
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime.asked import QUESTION_ARGUMENTS, take_question
from hawk_compile.runtime.forward import run
from hawk_compile.runtime.generation import (
    Generation,
    generating,
    holding,
    owner_of,
    running,
)
from hawk_compile.runtime.originals import looks_like, original
from hawk_compile.runtime.parts import HandedOn, class_of, handing_on, text_forward_of, text_part
from hawk_compile.runtime.prefill import run_prefill
from hawk_compile.runtime.recognised import refuse_rebuilt
from hawk_compile.runtime.saving import save_of, upload
from hawk_compile.runtime.split import placed
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.tracked import refuse_spoiled
from hawk_compile.runtime.wholes import refuse_speech
from hawk_compile.runtime.within_generate import (
    PREPARE_INPUTS,
    candidate_generator,
    compiled_call,
    encode_images,
    inputs_of,
    masks_for_generate,
    position_ids_for_generation,
    prefill_whole,
    prepare_cache,
    prunes,
)

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
        PREPARE_INPUTS: inputs_of(definer(kind, PREPARE_INPUTS)),
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
        own = owner_of(self, (named.get("input_ids"), named.get("inputs_embeds")))
        with holding(running, own), handing_on(None):
            return run(self, runtime, original(self, "forward"), named)

    return looks_like(forward, kind.forward)


@functools.cache
def generate_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """generate, whose steps know of one another and of its question, and whose output knows what the prefill did."""

    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        refuse_spoiled(kwargs.get("past_key_values"))  # before positions behind it are worked out
        if (runtime := self.__dict__.get(RUNTIME)) is not None:
            refuse_rebuilt(kwargs.get("past_key_values"), runtime.moved)
        if prunes(self, kwargs):
            refuse_speech(kwargs)
        generation = Generation(self, question=take_question(kwargs), inputs=kwargs)
        with generating(generation), handing_on(call_of(generation, args)):
            output = original(self, "generate")(*args, **kwargs)
        if isinstance(output, ModelOutput):
            output.hawk_record = generation.record  # type: ignore[attr-defined]
        return output

    return looks_like(generate, kind.generate)  # type: ignore[attr-defined]


def call_of(generation: Generation, args: tuple[Any, ...]) -> HandedOn | None:
    """What the language model of a model must know that it lets generate; None for all others.

    Raises:
        UnsupportedCallError: images without ids, which tell where they stand.
        InputError: ids among which no image stands.
    """
    model, kwargs = generation.model, generation.inputs
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

    def prefill(first: dict[str, Any]) -> Any:
        with holding(running, generation):
            return run_prefill(model, runtime, forward, placed(model, first))

    return HandedOn(model, part[1], ids, prefill)


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
