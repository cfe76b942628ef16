"""A model's prefill as one graph: what is captured, for whoever wants the graph.

`planned_forward` is what Dynamo captures, with the plan beside the model. The runtime compiles it; `capture_prefill`
gives its graph as it is, for passes to be run on: by inspection, and by tests, which capture a structure once and copy
it for each run.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.attention import capturing
from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.dynamo import capture_settings, compile_alone, equate_lengths
from hawk_compile.capture.features import arguments_of, cut_extra_rows
from hawk_compile.capture.merging import taking_features
from hawk_compile.capture.operators import begin_operators, end_operators
from hawk_compile.capture.patches import overridden
from hawk_compile.compat.dynamo import mark_static
from hawk_compile.errors import InputError


def planned_forward(
    forward: Callable[..., Any], inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...],
    along: tuple[str, ...] = (),
) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:  # fmt: skip
    """What Dynamo captures: the model's own forward with the plan beside it.

    Args:
        inputs: the forward's arguments by name; features as `join_features` gives them.
        past_mask: [B, P], nonzero for real tokens of the cache; None if it holds none.
        planned: the arguments of `hawk::plan`.
        along: names of inputs that run along the prompt, [..., B, S], beside those that every model has.

    Returns:
        The model's output, keep [B, S'], valid [B, S'] and scores [B, S].
    """
    mark_static(planned[2])  # the heads are a number; said here, where no other thread can miss it
    keep, valid, scores = torch.ops.hawk.plan(*planned)
    return unplanned_forward(forward, inputs, past_mask, planned[0], along), keep, valid, scores


def unplanned_forward(
    forward: Callable[..., Any], inputs: dict[str, Any], past_mask: Tensor | None, per_token: Tensor,
    along: tuple[str, ...] = (),
) -> ModelOutput:  # fmt: skip
    """The same without a plan, so that nothing is pruned.

    Args:
        per_token: [B, S], any tensor that says how long the prompt is.
    """
    outputs = cut_extra_rows(inputs["mm_encoder_outputs"])
    inputs = {name: given for name, given in inputs.items() if name != "mm_encoder_outputs"}
    inputs |= arguments_of(outputs)
    equate_lengths(inputs, per_token, along)
    if past_mask is not None:
        inputs = {**inputs, "attention_mask": torch.cat([past_mask, inputs["attention_mask"]], dim=1)}
    return forward(**inputs, return_dict=True)


class GraphTaken(BaseException):
    """Ends a compilation once its graph is there: nothing is compiled, and nothing runs. Of an Exception, Dynamo would
    make an error of its own."""


@dataclass(frozen=True)
class CapturedPrefill:
    """A prefill's graph as Dynamo captured it, before any pass.

    Attributes:
        gm: the graph. Passes rewrite it in place: run them on a `copy`.
        example_inputs: what it was captured with, placeholder by placeholder: tensors, parameters and sizes.
        leaves: the tensors of the call that it was captured with.
        outputs: the names of its outputs, in order; 'keep', 'valid' and 'scores' are the plan's.
    """

    gm: fx.GraphModule
    example_inputs: list[Any]
    leaves: tuple[Any, ...]
    outputs: tuple[str, ...]

    def copy(self) -> fx.GraphModule:
        """The graph again, for passes to rewrite; parameters and symbols are shared, nothing is captured anew."""
        return copy.deepcopy(self.gm)

    def run(
        self, gm: fx.GraphModule, inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...]
    ) -> dict[str, Tensor]:
        """What a rewritten copy gives for a call of the structure that was captured, of any size; outputs by name."""
        return dict(zip(self.outputs, gm(*self.arguments(inputs, past_mask, planned)), strict=True))

    def arguments(
        self, inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...]
    ) -> list[Any]:
        """The graph's inputs for a call of the structure that was captured.

        Raises:
            InputError: a call of another structure.
        """
        leaves = leaves_of((inputs, past_mask, planned))
        if [type(leaf) for leaf in leaves] != [type(leaf) for leaf in self.leaves]:
            raise other_structure(f"one of {len(leaves)} tensors and settings, captured was one of {len(self.leaves)}")
        now = {id(before): leaf for before, leaf in zip(self.leaves, leaves, strict=True)}
        given = [now.get(id(example), example) for example in self.example_inputs]
        nodes = self.gm.graph.find_nodes(op="placeholder")
        sizes = sizes_of(nodes, given)
        return [
            sizes[str(node.meta["example_value"])] if isinstance(value, SymInt) else value
            for node, value in zip(nodes, given, strict=True)
        ]


def sizes_of(nodes: Sequence[fx.Node], given: Sequence[Any]) -> dict[str, int]:
    """What the symbols of a graph are for these inputs.

    Raises:
        InputError: sizes that the graph does not serve.
    """
    sizes: dict[str, int] = {}
    for node, value in zip(nodes, given, strict=True):
        if isinstance(value, Tensor):
            shape = node.meta["example_value"].shape
            for size, real in zip(shape, value.shape, strict=True):
                name = str(size)  # a symbol, or a number that it was found to be
                if sizes.setdefault(name, int(name) if name.isdecimal() else real) != real:
                    raise other_structure(f"{node.name} {list(value.shape)}, captured was {list(shape)}")
    return sizes


def other_structure(difference: str) -> InputError:
    return InputError(f"the prefill was captured for calls of another structure: got {difference}; capture this one")


def leaves_of(value: Any) -> list[Any]:
    """What a call's arguments hold, in one order: tensors, settings, keys and values of a cache."""
    if isinstance(value, Cache):
        value = [(layer.keys, layer.values) for layer in value.layers]  # type: ignore[union-attr]
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves_of(part)]
    return [value]


def capture_prefill(
    model: PreTrainedModel, inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...],
    along: tuple[str, ...] = (),
) -> CapturedPrefill:  # fmt: skip
    """Capture a model's prefill as one graph; the model is left as it is, and nothing runs.

    Args:
        model: not optimised: what `optimize` puts on a model compiles its prefill itself.
        inputs, past_mask, planned, along: as `planned_forward` takes them; on the meta device too.

    Raises:
        CaptureError: the forward cannot be captured as one graph.
    """
    taken: list[tuple[fx.GraphModule, list[Any]]] = []

    def take(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        taken.append((gm, list(example_inputs)))
        raise GraphTaken

    function = compile_alone(planned_forward, taken=True, backend=take, fullgraph=True)
    begin_operators(function, model)
    try:
        with (
            contextlib.suppress(GraphTaken), capture_settings(), torch.no_grad(), diagnosed(model), overridden(model),
            capturing(model),
        ):  # fmt: skip
            function(taking_features(model, model.forward), dict(sorted(inputs.items())), past_mask, planned, along)
    finally:
        end_operators(function)
    gm, example_inputs = taken[0]
    # A graph and its copies number new nodes alike; the captured one counts those that Dynamo has thrown away.
    gm = copy.deepcopy(gm)
    results: Any = gm.graph.output_node().args[0]
    leaves = tuple(leaves_of((inputs, past_mask, planned)))
    return CapturedPrefill(gm, example_inputs, leaves, tuple(node.name for node in results))
