"""Exported components in the place of a model's own code: modules of its encoder, its prefill, its decode step."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.features import EXTRA_ROWS
from hawk_compile.capture.modalities import token_kinds
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.exporting.components import KEY, PAST_KEY, PAST_VALUE, VALUE
from hawk_compile.exporting.encoder import unnamed
from hawk_compile.exporting.manifest import Part, TensorSpec
from hawk_compile.exporting.prefill import named_features
from hawk_compile.plan.plan import Plan
from hawk_compile.runtime.conversation import physical_length

Session = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def encoder_call(child: nn.Module, session: Session) -> Callable[..., Any]:
    """What stands in for the forward of one of the encoder's modules."""
    signature = inspect.signature(type(child).forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = segments.flat(signature.bind(self, *args, **kwargs))
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        return unnamed(session(segments.prepared(child, tensors)))

    return types.MethodType(forward, child)


class ExportedPrefill:
    """Runs the exported prefill where an optimised model would run its compiled one."""

    compilations = 0
    scoring_layer = 0
    """What scores with a later layer is not exported: see `check_cache`."""

    def __init__(self, model: PreTrainedModel, session: Session, part: Part):
        self.model = model
        self.session = session
        self.inputs = {each.name: each for each in part.inputs}

    def run(
        self, forward: Any, inputs: dict[str, Any], past_mask: Tensor | None, plan: Plan, head_weights: Tensor,
        along: tuple[str, ...] = (),
    ) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
        if past_mask is not None or physical_length(inputs["past_key_values"]):
            raise UnsupportedCallError(
                "new images on a cache that already holds tokens: an exported prefill starts a conversation, so "
                "give the whole conversation at once"
            )
        refuse_hidden(inputs)
        ids = inputs["input_ids"]
        rows, length = ids.shape
        feed: dict[str, Tensor] = {name: inputs[name] for name in ("input_ids", *token_kinds(self.model, inputs))}
        feed["position_ids"] = fitted_positions(inputs.get("position_ids"), self.inputs["position_ids"])
        mask = inputs.get("attention_mask")
        feed["attention_mask"] = ids.new_ones((rows, length)) if mask is None else mask
        for modality, output in inputs["mm_encoder_outputs"].items():
            feed |= {name: joined(features) for name, features in named_features(modality, output).items()}
        feed["question_mask"] = plan.question_mask.long()
        feed |= {"budget": plan.budget, "kept_slots": torch.arange(plan.length)}
        if "kept_visual_slots" in self.inputs:
            feed["kept_visual_slots"] = torch.arange(plan.visual_slots)
        found = self.session(feed)
        for layer in range(sum(name.startswith("key_") for name in found)):
            inputs["past_key_values"].update(found[KEY.format(layer)], found[VALUE.format(layer)], layer)
        result = CausalLMOutputWithPast(
            logits=found["logits"].unsqueeze(1),
            past_key_values=inputs["past_key_values"],  # type: ignore[arg-type]
        )
        return result, found["keep"], found["valid"].bool(), found["scores"]


def joined(features: Any) -> Tensor:
    """[V, D] without the extra rows that a captured graph needs."""
    rows = features[0]  # of one tensor [1, V, D] or of a list [[V, D]], as join_features makes them
    return rows[: rows.shape[0] - EXTRA_ROWS]


def fitted_positions(positions: Tensor | None, spec: TensorSpec) -> Tensor:
    """Positions as the component counts them: [B, S], or one such row for each of mRoPE's axes.

    Left out is the row of text positions that generate puts ahead of mRoPE's; a single row holds for every axis.

    Raises:
        InputError: there are none.
    """
    if positions is None:
        raise InputError("position_ids are needed where the model is called without generate: give them, [B, S]")
    if len(spec.shape) == 2:
        return positions
    rows = positions.unsqueeze(0) if positions.ndim == 2 else positions
    axes: Any = spec.shape[0]
    return rows[-axes:] if len(rows) >= axes else rows[-1:].expand(axes, -1, -1)


def refuse_hidden(inputs: dict[str, Any]) -> None:
    """Refuse calls for what the exported components do not give or take."""
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise UnsupportedCallError(f"{name}=True: an exported model gives logits only; leave it out")
    if inputs.get("inputs_embeds") is not None:
        raise UnsupportedCallError("inputs_embeds: an exported model takes input_ids; give those")


def refuse_caches(kwargs: dict[str, Any]) -> None:
    """Refuse settings of generate, by themselves or in its `generation_config`, that ask for another cache or none."""
    config = kwargs.get("generation_config")
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in ("use_cache", "cache_implementation")}
    for name, given in asked.items():
        if given is False or isinstance(given, str):
            raise UnsupportedCallError(
                f"{name}={given!r}: an exported model keeps its keys and values in a plain DynamicCache(); leave it out"
            )


def decode_call(session: Session, part: Part) -> Callable[..., ModelOutput]:
    """The model's forward behind (or without) a cache: text only."""
    empty = {each.name: each for each in part.inputs if each.name.startswith("past_")}
    where = next(each for each in part.inputs if each.name == "position_ids")

    def forward(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> ModelOutput:  # fmt: skip
        refuse_hidden({"input_ids": input_ids, **kwargs})
        assert input_ids is not None  # tokens_of has seen to it that one of the two is given
        cache = DynamicCache() if past_key_values is None else past_key_values
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
            raise UnsupportedCallError(
                f"an exported model keeps its keys and values in a plain DynamicCache(), got {kinds}"
            )
        positions = fitted_positions(position_ids, where)
        rows, new = input_ids.shape
        asked = kwargs.get("logits_to_keep")
        if new > 1 and (isinstance(asked, Tensor) or asked != 1):
            raise UnsupportedCallError(
                f"an exported model gives the logits of the last position alone, and logits_to_keep={asked} was asked "
                f"of {new}: give logits_to_keep=1, and leave out assisted decoding"
            )
        past = physical_length(cache)
        feed: dict[str, Tensor] = {"input_ids": input_ids, "position_ids": positions}
        feed["attention_mask"] = input_ids.new_ones((rows, past + new)) if attention_mask is None else attention_mask
        for layer in range(len(empty) // 2):
            for name, attribute in ((PAST_KEY.format(layer), "keys"), (PAST_VALUE.format(layer), "values")):
                spec = empty[name]
                shape = (rows, spec.shape[1], 0, spec.shape[3])
                dtype = getattr(torch, spec.dtype)
                feed[name] = getattr(cache.layers[layer], attribute) if past else torch.zeros(shape, dtype=dtype)  # type: ignore[arg-type]
        found = session(feed)
        for layer in range(len(empty) // 2):
            keys, values = found[KEY.format(layer)], found[VALUE.format(layer)]
            if past:
                cache.layers[layer].keys, cache.layers[layer].values = keys, values  # type: ignore[union-attr]
            else:
                cache.update(keys, values, layer)
        return CausalLMOutputWithPast(logits=found["logits"].unsqueeze(1), past_key_values=cache)  # type: ignore[arg-type]

    return forward
