"""The parts of a model that are exported, as modules with tensors in and tensors out.

    encoder   the modules that `get_image_features` runs, see `encoder.py`
    prefill   input_ids [B, S], features [V, D], budget [B] -> logits [B, vocabulary], keys and values [B, Hkv, S', d]
    decode    input_ids [B, T], past keys and values [B, Hkv, P, d] -> logits, keys and values [B, Hkv, P + T, d]

In the prefill's graph the passes have put scoring, selection and gather; which text votes is computed in it from the
ids. S' enters as the length of `kept_slots` (and V' as that of `kept_visual_slots`), so no shape depends on data.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.dynamo import equate_lengths
from hawk_compile.capture.features import FEATURES, LAYER_FEATURES
from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import EXPORT_PASSES, PORTABLE_PASSES, run_passes
from hawk_compile.exporting.quiet import quiet
from hawk_compile.kernels.plan.op import slots
from hawk_compile.plan.question import SpecialIds, counted, is_any, voting_text
from hawk_compile.settings.config import HawkConfig

PREFILL, DECODE = "prefill", "decode"
FEATURES_INPUT = "{}_features"
LAYER_FEATURES_INPUT = "{}_layer_features_{}"
KEY, VALUE = "key_{}", "value_{}"
PAST_KEY, PAST_VALUE = "past_key_{}", "past_value_{}"

NAMED = {"batch": 1, "prompt": 2, "visual": 1, "kept": 2, "kept_visual": 1, "new": 1, "past": 0}
"""Sizes that are equal wherever they have the same name, with the least value of each."""

MOST = 2**31 - 1
"""No size is larger."""

RELATED = {"total", "patches", "merged_patches", "tiles", "segments", "longest_segment", "windows", "longest_window"}
"""Sizes that may depend on one another (patches on merged patches); torch.export finds out how."""

VMAP, INDEXING = "_vmap_expansion_sdpa", "TransformGetItemToIndex"
Shape = tuple[str | int, ...]


@dataclass
class Component:
    """One part of a model, ready to be exported.

    Attributes:
        name: 'prefill', 'decode', or that of an encoder.
        module: takes `sample` as keyword arguments and returns a dict of tensors.
        sample: inputs to trace it with: no two symbolic sizes are equal by need, none is 0 or 1.
        shapes: of each input: numbers, and names from `NAMED` or `RELATED` where it is symbolic.
        around: a context that tracing the module needs.
        least: the least values of sizes, where they are not those in `NAMED`.
        most: the largest values of sizes, for targets that need them; no limit where a size is not named.
        visual: visual tokens that an encoder's sample makes; 0 for other components.
    """

    name: str
    module: nn.Module
    sample: dict[str, Tensor]
    shapes: dict[str, Shape]
    around: Callable[[], Any] = field(default=torch.no_grad)
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    visual: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The symbolic sizes by name, as they are in the sample."""
        return {
            size: self.sample[name].shape[dim]
            for name, shape in self.shapes.items()
            for dim, size in enumerate(shape)
            if isinstance(size, str)
        }

    @property
    def least_sizes(self) -> dict[str, int]:
        """The smallest values of the symbolic sizes that have a name of their own."""
        return {name: self.least.get(name, NAMED[name]) for name in self.sizes if name in NAMED}

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        sizes: dict[str, Any] = {
            name: Dim(name, min=least, max=self.most.get(name, MOST)) for name, least in self.least_sizes.items()
        }
        sizes |= {name: Dim.DYNAMIC(max=self.most[name]) if name in self.most else Dim.DYNAMIC for name in RELATED}
        return {
            name: {dim: sizes.get(size, Dim.DYNAMIC) for dim, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in self.shapes.items()
        }

    @functools.cached_property
    def results(self) -> dict[str, Tensor]:
        """The module's outputs for the sample."""
        with torch.no_grad(), self.around():
            return self.module(**self.sample)

    def trace(self) -> ExportedProgram:
        """The module as an ExportedProgram, by transformers' exporter and its patches."""
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        with quiet(), broadcast_masks():
            return self.program(DynamoExporter, DynamoConfig)

    def program(self, exporter: Any, config: Any, **settings: Any) -> Any:
        """The module as one of transformers' exporters writes it, every named size symbolic.

        Args:
            exporter, config: the exporter's class and that of its settings.
            **settings: more of its settings.
        """
        made = config(
            dynamic=True, dynamic_shapes=self.dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True,
            **settings,
        )  # fmt: skip
        with self.around():
            return exporter().export_program(self.module, dict(self.sample), made)[0]


@contextlib.contextmanager
def broadcast_masks() -> Iterator[None]:
    """Let masks be built by broadcasting, as transformers' other exporters do: no pass can work out vmap's shapes.

    What turns a mask function's indexing into an operator of its own, for vmap's sake, is left out with it.
    """
    from transformers import masking_utils
    from transformers.exporters import utils

    found = [(masking_utils, name, make) for _, name, make in utils._PATCHES["onnx"] if name == VMAP]
    with utils.patch_attributes([*found, (masking_utils, INDEXING, lambda original: contextlib.nullcontext)]):
        yield


class Prefill(nn.Module):
    """A model's prefill with the plan beside it, as the passes expect it."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        ids: SpecialIds,
        query: str,
        head_weights: Tensor,
        outputs: dict[str, ModelOutput],
    ):
        super().__init__()
        self.model = model
        self.run = forward
        self.ids, self.query = ids, query
        self.register_buffer("head_weights", head_weights)
        self.placeholders = tuple(placeholder_ids(model))
        self.kinds = {modality: type(output) for modality, output in outputs.items()}
        self.one_tensor = {
            modality: isinstance(output[FEATURES], Tensor) for modality, output in outputs.items()
        }
        self.levels = {
            modality: [isinstance(level, Tensor) for level in output.get(LAYER_FEATURES) or ()]
            for modality, output in outputs.items()
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, budget: Tensor, kept_slots: Tensor, **given: Tensor
    ) -> Any:
        visual = is_any(input_ids, self.placeholders)
        votes, _ = voting_text(input_ids, visual, attention_mask != 0, self.ids)
        votes = counted(votes, self.query)
        kept_visual = given.pop("kept_visual_slots", kept_slots)
        lengths = slots(kept_slots.shape[0], kept_visual.shape[0], kept_slots.device)
        keep, valid, scores = torch.ops.hawk.plan(votes, budget, self.head_weights, *lengths)
        outputs = {modality: self.encoded(modality, given) for modality in self.kinds}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **given}
        equate_lengths(inputs, votes)
        torch._check(budget.shape[0] == votes.shape[0])
        cache = DynamicCache()
        result = self.run(
            **inputs,
            mm_encoder_outputs=outputs,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        return {"logits": result.logits[:, -1], "keep": keep, "valid": valid, "scores": scores, **held(cache)}

    def encoded(self, modality: str, given: dict[str, Tensor]) -> ModelOutput:
        """The encoder's output in the structure that the model expects, from features [V, D]."""
        features = given.pop(FEATURES_INPUT.format(modality))
        parts: dict[str, Any] = {FEATURES: whole(features, self.one_tensor[modality])}
        if self.levels[modality]:
            names = [LAYER_FEATURES_INPUT.format(modality, level) for level in range(len(self.levels[modality]))]
            levels = [given.pop(name) for name in names]
            for level in levels:
                torch._check(level.shape[0] == features.shape[0])
            parts[LAYER_FEATURES] = [
                whole(level, one) for level, one in zip(levels, self.levels[modality], strict=True)
            ]
        return self.kinds[modality](**parts)


def named_features(modality: str, output: ModelOutput) -> dict[str, Any]:
    """One modality's features, and those for later layers, by the names that they have as inputs of the prefill."""
    levels = output.get(LAYER_FEATURES) or []
    named = {LAYER_FEATURES_INPUT.format(modality, level): features for level, features in enumerate(levels)}
    return {FEATURES_INPUT.format(modality): output[FEATURES], **named}


def whole(features: Tensor, one_tensor: bool) -> Any:
    """Features [V, D] of all images as the model expects those of several: one tensor, or a list."""
    return features.unsqueeze(0) if one_tensor else [features]


class Decode(nn.Module):
    """Text behind a filled cache: one token per row and step, or a whole text turn."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any]):
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **past: Tensor) -> Any:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[PAST_KEY.format(layer)], past[PAST_VALUE.format(layer)], layer)
        result = self.run(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        return {"logits": result.logits[:, -1], **held(cache)}


def held(cache: DynamicCache) -> dict[str, Tensor]:
    """The keys and values of every layer by name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        found[KEY.format(index)], found[VALUE.format(index)] = layer.keys, layer.values  # type: ignore[assignment,union-attr]
    return found


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
    return replace(component, module=Rewritten(graph))
