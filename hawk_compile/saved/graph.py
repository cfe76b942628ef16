"""One call of a prefill, captured again as Dynamo captures it, pruned, and described so that it can be run without
Dynamo: what each input of the graph is, what the graph asks of the call, and what is made of its outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from transformers import PreTrainedModel

from hawk_compile.capture.attention import capturing
from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.dynamo import capture_settings, compile_alone
from hawk_compile.capture.prefill import planned_forward
from hawk_compile.compat.dynamo import dynamo_settings, size_as_it_came, what_is_asked_of_sizes
from hawk_compile.compile.pipeline import PLAIN_PASSES, PassOptions, run_passes
from hawk_compile.passes.site import Located, read
from hawk_compile.runtime.kinds import Kind, mapped
from hawk_compile.saved.calls import NotSaved, Recipe, described
from hawk_compile.saved.sizes import MANY, Written, symbols_in, written
from hawk_compile.saved.unchanged import Unchanged

MOST_CONSTANT_BYTES = 1 << 20
"""Of tensors within a graph: numbers of its code have some bytes, and a weight is none of them."""
OWN_CODE = ("mix_chunks", "run_experts", "choose_keys")
"""Operators of `hawk_compile.capture` that run a model's own functions, which are noted while a graph is captured."""


@dataclass
class Graph:
    """A pruned prefill without weights.

    Attributes:
        gm: takes tensors alone: of the call and weights.
        fakes: its inputs, of symbolic sizes.
        sources: what each input is: the place of one of the call's tensors, or the dotted path of a weight.
        call: what the call is made of, as `described`.
        shapes: of each of the call's tensors: what each size must be.
        symbols: symbol -> (place of a tensor, dimension) of which it is the size.
        ranges: symbol -> (least, largest) value; None: no bound.
        conditions: on sizes.
        recipe: what the call returns, and its cache.
        layer: the decoder layer that scores.
    """

    gm: fx.GraphModule
    fakes: list[Tensor]
    sources: list[int | str]
    call: Any
    shapes: list[list[Written]]
    symbols: dict[str, tuple[int, int]]
    ranges: dict[str, tuple[int | None, int | None]]
    conditions: list[Written]
    recipe: Any
    layer: int


def graph_of(
    model: PreTrainedModel, user: Any, forward: Callable[..., Any], options: PassOptions, kind: Kind,
    empty_cache: Callable[[], Any], compile_graph: Callable[[fx.GraphModule, list[Tensor]], None],
    told: Callable[[str], None],
) -> Graph:  # fmt: skip
    """Capture a call, prune it and compile it.

    Args:
        user: for whose life configurations may answer captures, as `capturing` takes it.
        forward: the model's own.
        empty_cache: makes the cache that a call is given.
        compile_graph: what takes the graph; what is asked of sizes is read when it is done, since it may ask more.
        told: of each stage, in a word.

    Raises:
        NotSaved: a call that no folder can serve.
    """
    inputs, planned, along = filled(kind, empty_cache())
    cache = inputs["past_key_values"]
    call: list[Tensor] = []
    description = described([inputs, None, planned, along], call)
    taken: list[tuple[fx.GraphModule, list[Any]]] = []
    given: list[Tensor] = []
    alone: list[bool] = []

    def take(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        told("passes")
        outputs: Any = gm.graph.output_node().args[0]
        gm = run_passes(gm, example_inputs, options, PLAIN_PASSES)
        taken.append((gm, example_inputs))
        alone.append(all(isinstance(output, fx.Node) and is_tensor(output) for output in outputs))
        given.extend(torch.empty(0) for _ in outputs)
        return lambda *_: tuple(given)

    before = Unchanged(model)
    function = compile_alone(planned_forward, taken=True, backend=take, fullgraph=True)
    told("capturing")
    # A call's own numbers are equal wherever this graph serves it: `described` holds them.
    with capture_settings(), dynamo_settings(specialize_int=True), diagnosed(model), capturing(model, user):
        result = function(forward, inputs, None, planned, along)
    if not before.still():
        raise NotSaved("its forward changes the model")
    if not all(alone):
        raise NotSaved("its graph returns a number, not tensors alone")
    gm, example_inputs = taken[0]
    layer = read(gm, Located).layer
    recipe = Recipe(call, given, cache).of([*result, cache])
    fakes, sources = flattened(gm, example_inputs, call, weights_of(model))
    refuse_large_constants(gm)
    refuse_registered(gm)
    shapes, symbols = shapes_of(call, fakes, sources)
    told("compiling")
    compile_graph(gm, fakes)
    ranges, conditions = asked_of_sizes(fakes, symbols)
    return Graph(gm, fakes, sources, description, shapes, symbols, ranges, conditions, recipe, layer)


def filled(kind: Kind, cache: Any) -> Kind:
    """A kind as a call of it, of zeros."""
    inputs, planned, along = kind
    return {**mapped(inputs, zeros), "past_key_values": cache}, mapped(planned, zeros), along


def zeros(tensor: Tensor) -> Tensor:
    """What a capture is given in the place of a tensor that has a shape alone."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def weights_of(model: PreTrainedModel) -> dict[int, str]:
    """id of a parameter or buffer -> its dotted path, the first that leads to it."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): path for path, tensor in reversed(named)}


def flattened(
    gm: fx.GraphModule, example_inputs: Sequence[Any], call: Sequence[Tensor], weights: dict[int, str]
) -> tuple[list[Tensor], list[int | str]]:
    """(fake inputs, where they come from) of a graph that is let take tensors alone: sizes are read from these.

    Raises:
        NotSaved: it takes something else.
    """
    places: dict[int, int | str] = {**weights, **{id(tensor): place for place, tensor in enumerate(call)}}
    nodes = gm.graph.find_nodes(op="placeholder")
    tensors = [node for node in nodes if is_tensor(node)]
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in nodes:
        if is_tensor(node):
            continue
        if node.users:
            with gm.graph.inserting_before(first):
                node.replace_all_uses_with(size_read(gm.graph, node, tensors))
        gm.graph.erase_node(node)
    fakes, sources = [], []
    for node, example in zip(nodes, example_inputs, strict=True):
        if node not in tensors:
            continue
        if id(example) not in places:
            raise NotSaved(f"its graph reads {node.name}, a tensor that is neither of the call nor a weight")
        sources.append(places[id(example)])
        node.meta["val"] = node.meta["example_value"]
        fakes.append(node.meta["val"])
    gm.recompile()
    return fakes, sources


def size_read(graph: fx.Graph, node: fx.Node, tensors: Sequence[fx.Node]) -> fx.Node:
    """A node that reads from a tensor the size that an input is."""
    size = node.meta["example_value"]
    for tensor in tensors:
        for dim, other in enumerate(tensor.meta["example_value"].shape):
            if isinstance(size, SymInt) and str(other) == str(size):
                read_size = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
                read_size.meta["example_value"] = size
                return read_size
    raise NotSaved(f"its graph takes {node.name}, which is no size of a tensor")


def refuse_large_constants(gm: fx.GraphModule) -> None:
    """Refuse a graph that holds a weight itself."""
    held = [getattr(gm, str(node.target), None) for node in gm.graph.find_nodes(op="get_attr")]
    size = sum(value.nbytes for value in held if isinstance(value, Tensor))
    if size > MOST_CONSTANT_BYTES:
        raise NotSaved(f"its graph holds {size} bytes of tensors itself")


def refuse_registered(gm: fx.GraphModule) -> None:
    """Refuse operators that look by a name for what this process alone has noted of a model's own code."""
    for node in gm.graph.nodes:
        packet = getattr(node.target, "overloadpacket", node.target)
        if str(packet).startswith("hawk.") and str(packet).removeprefix("hawk.") in OWN_CODE:
            raise NotSaved(f"its graph holds {packet}, which runs the model's own code")


def shapes_of(
    call: Sequence[Tensor], fakes: Sequence[Tensor], sources: Sequence[int | str]
) -> tuple[list[list[Written]], dict[str, tuple[int, int]]]:
    """(what each size of the call's tensors must be, which symbol is which size)."""
    shapes: list[list[Written] | None] = [None] * len(call)
    symbols: dict[str, tuple[int, int]] = {}
    for fake, source in zip(fakes, sources, strict=True):
        if isinstance(source, str):
            if is_symbolic(fake):
                raise NotSaved(f"its graph takes the weight {source} of any size")
            continue
        sizes: list[Written] = []
        for dim, size in enumerate(fake.shape):
            if not isinstance(size, SymInt):
                sizes.append(int(size))
                continue
            came, now = size_as_it_came(size)
            if came.is_Symbol:
                symbols.setdefault(str(came), (source, dim))
            sizes.append(written(now))
        shapes[source] = sizes
    unread: list[list[Written]] = [[size if size < 2 else MANY for size in tensor.shape] for tensor in call]
    return [one or other for one, other in zip(shapes, unread, strict=True)], symbols


def asked_of_sizes(
    fakes: Sequence[Tensor], symbols: dict[str, tuple[int, int]]
) -> tuple[dict[str, tuple[int | None, int | None]], list[Written]]:
    """(ranges of symbols, conditions on them), but for what is about numbers alone.

    Raises:
        NotSaved: a condition on something that is no size of an input.
    """
    bounds, asked = what_is_asked_of_sizes(next(fake for fake in fakes if is_symbolic(fake)))
    fixed = {name: int(low) for name, (low, high) in bounds.items() if low == high}
    conditions = []
    for expression in asked:
        condition = written(expression)
        unknown = symbols_in(condition) - symbols.keys()
        if not unknown <= fixed.keys():
            raise NotSaved(f"its graph asks {expression}, which is not about its inputs' sizes alone")
        if not unknown >= symbols_in(condition):
            conditions.append(put(condition, {name: fixed[name] for name in unknown}))
    ranges = {name: (bound(bounds[name][0]), bound(bounds[name][1])) for name in symbols}
    return ranges, conditions


def is_symbolic(fake: Tensor) -> bool:
    return any(isinstance(size, SymInt) for size in fake.shape)


def bound(value: Any) -> int | None:
    return int(value) if getattr(value, "is_Integer", False) else None


def put(expression: Written, values: dict[str, int]) -> Written:
    """An expression with numbers in the place of symbols."""
    if isinstance(expression, list):
        return [expression[0], *(put(part, values) for part in expression[1:])]
    return values.get(expression, expression) if isinstance(expression, str) else expression
