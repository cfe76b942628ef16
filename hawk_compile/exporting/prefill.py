"""A model's prefill as a component, before and after the passes.

In the prefill's graph the passes have put scoring, selection and gather; which text votes is an input, made on the host
by `hawk_compile.plan.question`. S' enters as the length of `kept_slots` (and V' as that of `kept_visual_slots`), so no
shape depends on data.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.dynamo import equate_lengths
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import (
    LAYER_FEATURES,
    arguments_of,
    by_argument,
    class_for,
    features_of,
    field_of,
    of_layer,
    of_level,
)
from hawk_compile.capture.modalities import token_kinds, visual_places
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import EXPORT_PASSES, PORTABLE_PASSES, run_passes
from hawk_compile.exporting.caches import held_by
from hawk_compile.exporting.components import PREFILL, Component, Shape, attending
from hawk_compile.exporting.mixers import inline_mixers
from hawk_compile.kernels.compat import check
from hawk_compile.kernels.plan.op import slots
from hawk_compile.plan.ids import SpecialIds, special_ids
from hawk_compile.plan.plan import make_plan, on_host
from hawk_compile.runtime.handover import scratch_cache, scratch_layers
from hawk_compile.runtime.originals import original
from hawk_compile.runtime.positions import deltas_kept
from hawk_compile.settings.config import HawkConfig

FEATURES_INPUT = "{}_features"
LAYER_FEATURES_INPUT = "{}_layer_features_{}"


class Prefill(nn.Module):
    """A model's prefill with the plan beside it, as the passes expect it."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        head_weights: Tensor,
        outputs: dict[str, ModelOutput],
    ):
        super().__init__()
        self.model = model
        self.run = forward
        self.register_buffer("head_weights", head_weights)
        self.kinds = {modality: class_for(type(output)) for modality, output in outputs.items()}
        self.fields = {modality: field_of(output) for modality, output in outputs.items()}
        self.one_tensor = {modality: isinstance(features_of(output), Tensor) for modality, output in outputs.items()}
        # Of each later layer: its number, where the encoder says it, and whether its features are one tensor.
        self.levels = {
            modality: [of_layer(level, is_tensor) for level in output.get(LAYER_FEATURES) or ()]
            for modality, output in outputs.items()
        }
        self.layers = scratch_layers(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, question_mask: Tensor, budget: Tensor, kept_slots: Tensor,
        **given: Tensor,
    ) -> Any:  # fmt: skip
        asked = question_mask != 0
        kept_visual = given.pop("kept_visual_slots", kept_slots)
        lengths = slots(kept_slots.shape[0], kept_visual.shape[0], kept_slots.device)
        keep, valid, scores = torch.ops.hawk.plan(asked, budget, self.head_weights, *lengths)
        outputs = {modality: self.encoded(modality, given) for modality in self.kinds}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **given}
        equate_lengths(inputs, asked, tuple(given))
        check(budget.shape[0] == asked.shape[0])
        cache = scratch_cache(None, self.layers)
        result = self.run(
            **inputs,
            **arguments_of(by_argument(self.model, outputs)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return {"logits": result.logits[:, -1], "keep": keep, "valid": valid, "scores": scores, **held_by(cache)}

    def encoded(self, modality: str, given: dict[str, Tensor]) -> ModelOutput:
        """The encoder's output in the structure that the model expects, from features [V, D]."""
        names = [LAYER_FEATURES_INPUT.format(modality, level) for level in range(len(self.levels[modality]))]
        levels, parts = [given.pop(name) for name in names], {}
        if self.fields[modality] != LAYER_FEATURES:
            features = given.pop(FEATURES_INPUT.format(modality))
            parts[self.fields[modality]] = whole(features, self.one_tensor[modality])
        else:
            features = levels[0]
        for level in levels:
            check(level.shape[0] == features.shape[0])
        if levels:
            parts[LAYER_FEATURES] = [
                of_layer(kind, functools.partial(whole, level))
                for level, kind in zip(levels, self.levels[modality], strict=True)
            ]
        return self.kinds[modality](**parts)


def named_features(modality: str, output: ModelOutput) -> dict[str, Any]:
    """One modality's features, and those for later layers, by the names that they have as inputs of the prefill."""
    levels = [of_level(level) for level in output.get(LAYER_FEATURES) or []]
    named = {LAYER_FEATURES_INPUT.format(modality, level): features for level, features in enumerate(levels)}
    if field_of(output) == LAYER_FEATURES:
        return named
    return {FEATURES_INPUT.format(modality): features_of(output), **named}


def is_tensor(features: Any) -> bool:
    return isinstance(features, Tensor)


def whole(features: Tensor, one_tensor: bool) -> Any:
    """Features [V, D] of all images as the model expects those of several: one tensor, or a list."""
    return features.unsqueeze(0) if one_tensor else [features]


def prefill_component(
    model: PreTrainedModel, inputs: dict[str, Any], config: HawkConfig, head_weights: Tensor
) -> Component:
    """The prefill with every row of the inputs twice for a sample."""
    encoded = encoded_prompt(model, inputs)
    outputs = {name: output for name, output in encoded["mm_encoder_outputs"].items() if output is not None}
    special = special_ids(model, config)
    prompt, features = prompt_sample(model, encoded), features_sample(outputs)
    layered = any(output.get(LAYER_FEATURES) for output in outputs.values())
    sample = {**prompt, **features, **plan_sample(model, prompt, outputs, special, config, layered)}
    shapes = {name: shape_of(name, value) for name, value in sample.items()}
    weights = head_weights.to(prompt["input_ids"].device)
    module = Prefill(model, original(model, "forward"), weights, outputs)
    around = functools.partial(attending, model)
    return Component(PREFILL, module.eval(), sample, shapes, around, least_of(model, layered))


def least_of(model: PreTrainedModel, layered: bool) -> dict[str, int]:
    """The least sizes of a prefill. Features of later layers are added to two tokens or more: one row would broadcast.
    A convolution keeps as many tokens as its kernel is wide: fewer would be padded, which is another graph."""
    kernels = [
        part.kernel_size[0] for part in model.get_decoder().modules()
        if isinstance(part, nn.Conv1d) and part.groups == part.in_channels
    ]  # fmt: skip
    widest = max(kernels, default=0)
    return ({"visual": 2} if layered else {}) | ({"prompt": widest, "kept": widest} if widest > 2 else {})


def encoded_prompt(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with their images encoded; the model is left as it was."""
    with torch.no_grad(), deltas_kept(model):
        return run_encoders(model, dict(inputs))


def prompt_sample(model: PreTrainedModel, encoded: dict[str, Any]) -> dict[str, Tensor]:
    """What runs along the prompt [B, S], every row twice: ids, mask, positions, and kinds of tokens where given."""
    ids, mask, positions = (encoded.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids is not None  # export has seen to it
    mask = torch.ones_like(ids) if mask is None else mask
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    sample = {"input_ids": twice(ids, 0), "attention_mask": twice(mask, 0), "position_ids": twice(positions, -2)}
    return sample | {name: twice(encoded[name], 0) for name in token_kinds(model, encoded)}


def features_sample(outputs: dict[str, ModelOutput]) -> dict[str, Tensor]:
    """The features [V, D] of every modality, and those for later layers, all of them twice."""
    named = [named_features(modality, output) for modality, output in outputs.items()]
    return {name: twice(rows_of(features), 0) for each in named for name, features in each.items()}


def plan_sample(
    model: PreTrainedModel, prompt: dict[str, Tensor], outputs: dict[str, ModelOutput], special: SpecialIds,
    config: HawkConfig, layered: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """What the prefill is told of its plan: the question, budgets, and two inputs of which only the lengths count."""
    ids = prompt["input_ids"]
    host, real = on_host(ids, prompt["attention_mask"])
    visual = visual_places(model, host, outputs)
    count = sum(2 * len(rows_of(features_of(output))) for output in outputs.values())
    plan = make_plan(host, visual, real, count, special, config).to(ids.device)
    sample = {"question_mask": plan.question_mask.long(), "budget": plan.budget}
    sample["kept_slots"] = torch.arange(plan.length, device=ids.device)
    if layered:
        sample["kept_visual_slots"] = torch.arange(plan.visual_slots, device=ids.device)
    return sample


def shape_of(name: str, value: Tensor) -> Shape:
    """The symbolic shape of an input of the prefill."""
    match name:
        case "position_ids":
            return (*value.shape[:-2], "batch", "prompt")
        case "budget":
            return ("batch",)
        case "kept_slots":
            return ("kept",)
        case "kept_visual_slots":
            return ("kept_visual",)
        case _ if value.is_floating_point():  # features
            return ("visual", value.shape[1])
        case _:  # ids, mask, kinds of tokens
            return ("batch", "prompt")


def twice(values: Tensor, dim: int) -> Tensor:
    """All rows (or their features) a second time, so that the batch is at least two."""
    return torch.cat([values, values], dim)


def rows_of(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """[V, D] of one modality's features."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


class Rewritten(nn.Module):
    """A rewritten graph as a module like any other: exporters replace a module's forward; a GraphModule has none."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph_module = graph

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        return self.graph_module(**tensors)


def prune(component: Component, config: HawkConfig, portable: bool, selection: str = "sort") -> Component:
    """The prefill with the passes run on its graph.

    Args:
        portable: leave no operator that is not PyTorch's own, and no data-dependent shape.
        selection: how such a graph selects, 'sort' or 'threshold' (for targets whose sort is limited in length).

    Raises:
        GraphError: the graph cannot be pruned.
    """
    graph = component.trace().module(check_guards=False)
    options = options_of(config, selection=selection)
    graph = run_passes(graph, [], options, (*EXPORT_PASSES, *PORTABLE_PASSES) if portable else EXPORT_PASSES)
    graph = inline_mixers(graph)
    return replace(component, module=Rewritten(graph))
