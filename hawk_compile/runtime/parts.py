"""Models whose `generate` does not run their forward, but that of a part.

Omni models hand the prompt on to a whole vision-language model inside them (`hawk_compile.runtime.wholes`). Others
merge the images themselves and let their language model generate from embeddings: its first forward is then run by the
model's own, which prunes, and the later ones read the pruned cache.
"""

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hawk_compile.capture.features import FEATURES
from hawk_compile.capture.modalities import encoder_of, placeholders_by_modality, takes, tokens_of
from hawk_compile.capture.patches import is_captured
from hawk_compile.capture.segments import name_of_rest
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.forward import by_slots
from hawk_compile.runtime.tracked import TrackedCache, opened, refuse_spoiled


@functools.cache
def goes_around_forward(kind: Any) -> bool:
    """Whether a class has a `generate` of its own that does not go on to transformers' own, which runs the forward."""
    return not runs_forward(inspect.getmro(kind))


def runs_forward(kinds: tuple[Any, ...]) -> bool:
    """Whether the first `generate` that these classes hold, each a base of those before it, leads to transformers'."""
    place = next((place for place, kind in enumerate(kinds) if vars(kind).get("generate") is not None), None)
    if place is None or (code := code_of(vars(kinds[place])["generate"])) is code_of(GenerationMixin.generate):
        return True
    above = kinds[place + 1 :]
    if code is None:  # nobody can say what it runs
        return False
    if "__class__" in code.co_freevars:  # which `super()` reads
        return runs_forward(above)
    named = [number for number, kind in enumerate(above) if kind.__name__ in code.co_names]
    return "generate" in code.co_names and any(runs_forward(above[number:]) for number in named)


def code_of(method: Any) -> types.CodeType | None:
    """The code of a method, behind what wraps it; None where it has none that can be read."""
    while isinstance(method, (functools.partial, functools.partialmethod)):
        method = method.func
    return getattr(inspect.unwrap(method), "__code__", None)


def text_part(model: PreTrainedModel) -> tuple[str, PreTrainedModel] | None:
    """The language model that generates from embeddings in a model's place: (its name, itself); None of others."""
    if not goes_around_forward(class_of(model)):
        return None
    return next(iter(generating_parts(model)), None)


def generating_parts(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    return [
        (name, part) for name, part in model.named_children()
        if isinstance(part, PreTrainedModel) and part.can_generate()
    ]  # fmt: skip


def class_of(model: PreTrainedModel) -> Any:
    return type(model)


@dataclass
class HandedOn:
    """A call of generate under way that lets a language model generate from embeddings.

    Attributes:
        model: whose generate it is.
        part: its language model.
        input_ids: [B, S] of the prompt.
        prefill: (arguments) -> output of the model's own forward, pruned.
        begun: whether its prompt was prefilled: another one behind that is of a logits processor or the like, unless
            every step is a prefill.
    """

    model: PreTrainedModel
    part: PreTrainedModel
    input_ids: Tensor
    prefill: Callable[[dict[str, Any]], Any]
    begun: bool = False

    def run(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One call of the language model's forward.

        Raises:
            UnsupportedCallError: a first call with less, or more, than the prompt.
        """
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        refuse_spoiled(cache)
        if physical_length(cache) == 0:
            if self.begun and kwargs.get("use_cache") is not False:
                return forward(**kwargs)
            return self.first(kwargs, embeds)
        if isinstance(cache, TrackedCache):
            kwargs = by_slots(self.part, cache, with_positions(kwargs))
        with opened(cache):
            return forward(**kwargs)

    def first(self, kwargs: dict[str, Any], embeds: Tensor | None) -> CausalLMOutputWithPast:
        ids, positions = self.input_ids, kwargs.get("position_ids")
        lengths = {ids.shape[1], *(each.shape[-1] for each in (positions,) if each is not None)}
        drafted = isinstance(asked := kwargs.get("logits_to_keep"), int) and asked > 1
        if embeds is None or lengths != {embeds.shape[1]} or embeds.shape[0] % ids.shape[0] or drafted:
            raise UnsupportedCallError(
                f"{type(self.model).__name__}.generate does not run its language model on the prompt of {ids.shape[1]} "
                "tokens at once: leave out what cuts or lengthens the prompt (prefill_chunk_size, use_cache=False, an "
                "assistant), or hawk_compile.restore the model"
            )
        ids = ids.repeat_interleave(embeds.shape[0] // ids.shape[0], dim=0).to(embeds.device)
        left = {name: value for name, value in kwargs.items() if name not in ("inputs_embeds", "input_ids")}
        result = self.prefill({**left, "input_ids": ids, "mm_encoder_outputs": encoded_in(self.model, ids, embeds)})
        self.begun = True
        return CausalLMOutputWithPast(logits=result["logits"], past_key_values=kwargs.get("past_key_values"))


def encoded_in(model: PreTrainedModel, input_ids: Tensor, embeds: Tensor) -> dict[str, ModelOutput]:
    """modality -> the features that stand in merged embeddings [B, S, D], in one tensor."""
    outputs: dict[str, ModelOutput] = {}
    for modality, number in placeholders_by_modality(model).items():
        if number is not None and takes(model, modality):
            features = embeds[input_ids == number]
            outputs[modality] = output_class(model, modality)(**{FEATURES: features.unsqueeze(0)})
    return outputs


def output_class(model: PreTrainedModel, modality: str) -> type[ModelOutput]:
    """The class that an encoder says it returns: the model may look for its other fields."""
    encode = encoder_of(model, modality)
    hint = None if encode is None else inspect.signature(encode).return_annotation
    kinds = [hint, *typing.get_args(hint)]
    named = (each for each in kinds if isinstance(each, type) and issubclass(each, ModelOutput))
    return next(named, BaseModelOutputWithPooling)


def with_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the positions that the conversation gives to new tokens: the cache holds fewer."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return kwargs
    return {**kwargs, "position_ids": (mask.long().cumsum(1) - 1)[:, -tokens_of(kwargs).shape[1] :]}


handed_on: ContextVar[HandedOn | None] = ContextVar("hawk_handed_on", default=None)
"""Each thread and each asynchronous task has its own."""


@contextlib.contextmanager
def handing_on(call: HandedOn | None) -> Iterator[None]:
    """Let the language model's forwards inside belong to a call of generate."""
    before = handed_on.get()
    try:
        handed_on.set(call)
        yield
    finally:
        handed_on.set(before)


@functools.cache
def text_forward_of(kind: Any) -> Callable[..., Any]:
    """The forward of a language model that an optimised model lets generate; as it is everywhere else."""
    signature = inspect.signature(kind.forward)
    rest = name_of_rest(signature)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if is_captured():
            return kind.forward(self, *args, **kwargs)
        call = handed_on.get()
        if call is None or call.part is not self:
            return kind.forward(self, *args, **kwargs)
        named = signature.bind(self, *args, **kwargs).arguments
        named = {**named, **named.pop(str(rest), {})}
        del named[next(iter(named))]  # self
        with handing_on(None), torch.no_grad():
            return call.run(types.MethodType(kind.forward, self), named)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
