"""Exported components in the place of a model's own code: modules of its encoder, its prefill, its decode step."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.features import EXTRA_ROWS
from hawk_compile.capture.modalities import AUDIO, MERGED_BY_NAME, positions_by_images, token_kinds
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.exporting import bounds
from hawk_compile.exporting.caches import PAST, fill, held_by, is_held, length_dim, replace
from hawk_compile.exporting.manifest import Part, TensorSpec
from hawk_compile.exporting.modules import unnamed
from hawk_compile.exporting.prefill import named_features
from hawk_compile.plan.plan import Plan
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.generation import running
from hawk_compile.runtime.handover import first_with_keys, scratch_cache, scratch_layers

Session = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def encoder_call(child: nn.Module, session: Session, part: Part) -> Callable[..., Any]:
    """What stands in for the forward of one of the encoder's modules."""
    signature = inspect.signature(type(child).forward)
    prepared = bounds.prepared if bounds.are_prepared(each.name for each in part.inputs) else segments.prepared

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = segments.flat(signature.bind(self, *args, **kwargs))
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        return unnamed(session(prepared(child, tensors)))

    return types.MethodType(forward, child)


class ExportedPrefill:
    """Runs the exported prefill where an optimised model would run its compiled one."""

    compilations = 0

    def __init__(self, model: PreTrainedModel, session: Session, part: Part):
        self.model = model
        self.session = session
        self.scoring_layer = first_with_keys(model)
        self.inputs = {each.name: each for each in part.inputs}

    def outdated(self, model: PreTrainedModel) -> bool:
        """Never: no class's forward is read any more."""
        return False

    def run(
        self, forward: Any, inputs: dict[str, Any], past_mask: Tensor | None, plan: Plan, head_weights: Tensor,
        along: tuple[str, ...] = (), before_capture: Any = None,
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
        positions = inputs.get("position_ids")
        if positions is None and counts_itself(self.model):
            positions = torch.arange(length).expand(rows, -1)
        feed["position_ids"] = fitted_positions(positions, self.inputs["position_ids"])
        mask = inputs.get("attention_mask")
        feed["attention_mask"] = ids.new_ones((rows, length)) if mask is None else mask
        for argument, output in inputs["mm_encoder_outputs"].items():
            modality = argument if argument in MERGED_BY_NAME else AUDIO
            feed |= {name: joined(features) for name, features in named_features(modality, output).items()}
        feed["question_mask"] = plan.question_mask.long()
        feed |= {"budget": plan.budget, "kept_slots": torch.arange(plan.length)}
        if "kept_visual_slots" in self.inputs:
            feed["kept_visual_slots"] = torch.arange(plan.visual_slots)
        found = self.session(feed)
        fill(inputs["past_key_values"], {name: tensor for name, tensor in found.items() if is_held(name)})
        result = CausalLMOutputWithPast(
            logits=found["logits"].unsqueeze(1),
            past_key_values=inputs["past_key_values"],  # type: ignore[arg-type]
        )
        return result, found["keep"], found["valid"].bool(), found["scores"]


def joined(features: Any) -> Tensor:
    """[V, D] without the extra rows that a captured graph needs."""
    rows = features[0]  # of one tensor [1, V, D] or of a list [[V, D]], as join_features makes them
    return rows[: rows.shape[0] - EXTRA_ROWS]


def counts_itself(model: PreTrainedModel) -> bool:
    """Whether a model is asked without positions inside generate, which gives them to every other: it then counts all
    tokens, padding among them."""
    return running.get() is not None and not positions_by_images(model)


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
                f"{name}={given!r}: an exported model fills a DynamicCache of its own kinds of layers; leave it out"
            )


def check_layers(cache: Cache, kinds: list[type]) -> None:
    """Refuse a cache that an exported model cannot go on from.

    Args:
        kinds: of its layers; none where all are plain.
    """
    own: list[type] = [type(layer) for layer in cache.layers]
    if own and own != (kinds or [DynamicLayer] * len(own)):
        wanted = "DynamicCache(config=model.config.get_text_config())" if kinds else "DynamicCache()"
        raise UnsupportedCallError(
            f"an exported model keeps its keys and values in a plain {wanted}, got "
            f"{', '.join(sorted({kind.__name__ for kind in own}))}: leave past_key_values out"
        )


def decode_call(model: PreTrainedModel, session: Session, part: Part) -> Callable[..., ModelOutput]:
    """The model's forward behind (or without) a cache: text only."""
    specs = {each.name: each for each in part.inputs}
    layers = scratch_layers(model)
    kinds = [type(layer) for layer in layers]
    one_by_one = specs["input_ids"].shape[1] == 1

    def forward(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> ModelOutput:  # fmt: skip
        refuse_hidden({"input_ids": input_ids, **kwargs})
        assert input_ids is not None  # tokens_of has seen to it that one of the two is given
        cache = scratch_cache(None, layers) if past_key_values is None else past_key_values
        check_layers(cache, kinds)
        rows, new = input_ids.shape
        if position_ids is None and counts_itself(model):
            position_ids = (torch.arange(new) + int(cache.get_seq_length())).expand(rows, -1)
        positions = fitted_positions(position_ids, specs["position_ids"])
        asked = kwargs.get("logits_to_keep")
        if new > 1 and (isinstance(asked, Tensor) or asked != 1):
            raise UnsupportedCallError(
                f"an exported model gives the logits of the last position alone, and logits_to_keep={asked} was asked "
                f"of {new}: give logits_to_keep=1, and leave out assisted decoding"
            )
        past = physical_length(cache)
        mask = input_ids.new_ones((rows, past + new)) if attention_mask is None else attention_mask
        for first in range(0, new, 1 if one_by_one else new):
            last = first + 1 if one_by_one else new
            feed = {"input_ids": input_ids[:, first:last], "position_ids": positions[..., first:last]}
            logits = step(session, specs, cache, {**feed, "attention_mask": mask[:, : past + last]})
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=cache)  # type: ignore[arg-type]

    return forward


def step(session: Session, specs: dict[str, TensorSpec], cache: Cache, feed: dict[str, Tensor]) -> Tensor:
    """Logits [B, vocabulary] behind a cache, which takes what is new."""
    held, rows = held_by(cache) if physical_length(cache) else {}, len(feed["input_ids"])
    wanted = {name.removeprefix(PAST): spec for name, spec in specs.items() if name.startswith(PAST)}
    past = {name: held[name] if held else nothing(spec, rows) for name, spec in wanted.items()}
    found = session({**feed, **{PAST + name: tensor for name, tensor in past.items()}})
    made = {name: tensor for name, tensor in found.items() if is_held(name)}
    real = feed["attention_mask"][:, -1]
    for name, state in made.items():
        if length_dim(name) is None:  # padding on the left leaves a state as empty as it was
            made[name] = state * real.view(rows, *[1] * (state.ndim - 1)).to(state.dtype)
    (replace if held else fill)(cache, made)
    return found["logits"]


def nothing(spec: TensorSpec, rows: int) -> Tensor:
    """What a cache holds before the first token."""
    shape = [size if isinstance(size, int) else rows if size == "batch" else 0 for size in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))
