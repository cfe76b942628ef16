"""Let equal decoder layers share one graph, so that a compiler behind compiles it once.

    before: attention 0 -> o_proj 0, mlp 0, norm 1, q k v 1 -> attention 1 -> o_proj 1, mlp 1, norm 2, q k v 2 -> ...
    after:  attention 0 -> layer(weights of 0 and 1) -> layer(weights of 1 and 2) -> ...

A stretch reaches from behind one attention to the next one. Those that do the same, but for what they read from
outside, become calls of one subgraph (`torch.ops.higher_order.invoke_subgraph`). What cannot be called so stays as it
is: stretches that write into what they read, have other effects, read tensors of other types than plain ones, or
return what shares memory; and a graph of which gradients may be asked, since weights that need none could share a call
with weights that do.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from hawk_compile.passes.attention import attends
from hawk_compile.passes.compat import invoke_subgraph, tree_flatten
from hawk_compile.passes.graph import expr, is_plain, memories, op_name, tensor, value, written_by
from hawk_compile.passes.site import Split, read

NAME = "hawk_layer"


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes, and what they read from outside, in the order of first use."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    work: tuple[Any, ...]
    """What is done with which of both, and of what kind they are: equal for stretches that do the same."""


def fold_layers(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Replace equal stretches by calls of one subgraph each."""
    boundary = read(gm, Split).boundary
    if torch.is_grad_enabled() and any(needs_gradient(node) for node in gm.graph.nodes):
        return gm
    groups: dict[tuple[Any, ...], list[Stretch]] = {}
    for nodes in between_attentions(gm.graph, boundary):
        found = stretch(nodes)
        groups.setdefault(found.work, []).append(found)
    replaced: dict[fx.Node, fx.Node] = {}
    symbols = sizes_by_symbol(gm.graph)
    for number, group in enumerate(each for each in groups.values() if len(each) > 1):
        returned = read_outside(group)
        needed = symbols_of(group[0].inputs)
        if needed <= symbols.keys() and all(callable_alone(each, returned) for each in group):
            sizes = [symbols[symbol] for symbol in sorted(needed, key=str)]
            replace(gm, f"{NAME}_{number}", group, returned, sizes, replaced)
    return gm


def needs_gradient(node: fx.Node) -> bool:
    given = tensor(node)
    return node.op in ("placeholder", "get_attr") and given is not None and given.requires_grad


def between_attentions(graph: fx.Graph, boundary: fx.Node) -> Iterator[list[fx.Node]]:
    """The nodes behind each attention of the decoder, up to and with the next one."""
    behind = False
    nodes: list[fx.Node] | None = None
    for node in graph.nodes:
        behind = behind or node is boundary
        if nodes is not None:
            nodes.append(node)
        if behind and attends(node):
            if nodes is not None:
                yield nodes
            nodes = []


def stretch(nodes: list[fx.Node]) -> Stretch:
    places = {node: place for place, node in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    work = []
    for node in nodes:
        leaves, structure = tree_flatten((apart(node.args), apart(node.kwargs)))
        read: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, fx.Node):
                read.append((type(leaf), repr(leaf)))
            elif leaf in places:
                read.append(places[leaf])
            else:
                read.append((fx.Node, inputs.setdefault(leaf, len(inputs))))
        work.append((node.op, node.target, structure, tuple(read)))
    return Stretch(nodes, list(inputs), (*work, *map(kind_of, inputs)))


def kind_of(node: fx.Node) -> Any:
    """What is known of a value without running: of a tensor its types, place, sizes and strides."""
    given = tensor(node)
    if given is None:
        return repr(value(node))
    return type(given), given.dtype, given.device, repr(given.shape), repr(given.stride())


def apart(argument: Any) -> Any:
    """An argument with its slices, which may hold nodes, taken apart."""
    if isinstance(argument, slice):
        return (slice, apart(argument.start), apart(argument.stop), apart(argument.step))
    if isinstance(argument, (tuple, list)):
        return [type(argument), *map(apart, argument)]
    if isinstance(argument, dict):
        return {name: apart(each) for name, each in argument.items()}
    return argument


def read_outside(group: list[Stretch]) -> list[int]:
    """The places of nodes that something outside their stretch reads, in any of the group."""
    found = set()
    for each in group:
        inside = set(each.nodes)
        found |= {place for place, node in enumerate(each.nodes) if not inside.issuperset(node.users)}
    return sorted(found)


def sizes_by_symbol(graph: fx.Graph) -> dict[Any, fx.Node]:
    """The first node that is a symbol itself, for each symbol that an input has: what is known of sizes that the graph
    itself reads from tensors is checked where they are used, by symbols that a subgraph does not have."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        size = value(node)
        if isinstance(size, SymInt) and size.node.expr.is_Symbol and not free_unbacked_symbols(size):
            found.setdefault(size.node.expr, node)
    return found


def symbols_of(inputs: list[fx.Node]) -> set[Any]:
    """The symbols in the inputs' sizes and strides, which a compiler must be able to read where these are used."""
    found: set[Any] = set()
    for node in inputs:
        given = tensor(node)
        sizes = (value(node),) if given is None else (*given.shape, *given.stride())
        found = found.union(*(expr(size).free_symbols for size in sizes if isinstance(size, SymInt)))  # type: ignore[union-attr]
    return found


def callable_alone(given: Stretch, returned: list[int]) -> bool:
    """Whether it has plain tensors and sizes as inputs, returns such tensors with memory of their own, and does nothing
    else. (A call of a subgraph cannot be traced with tensors of other types, such as quantised weights.)"""
    if not all(isinstance(value(node), SymInt) or is_plain(value(node)) for node in given.inputs):
        return False
    if any(node.op not in ("call_function", "call_method") or has_effects(node) for node in given.nodes):
        return False
    results = [tensor(given.nodes[place]) for place in returned]
    if not all(map(is_plain, results)):
        return False
    read = set().union(*(memories(value(node)) for node in given.inputs))
    made = [memory for result in results for memory in memories(result)]
    return len({*made}) == len(made) and read.isdisjoint(made)


def has_effects(node: fx.Node) -> bool:
    """Whether it does something beside returning a value."""
    return bool(written_by(node)) or op_name(node).startswith("_") or node.is_impure()


def replace(
    gm: fx.GraphModule, name: str, group: list[Stretch], returned: list[int], sizes: list[fx.Node],
    replaced: dict[fx.Node, fx.Node],
) -> None:  # fmt: skip
    """Put a call of one subgraph in the place of every stretch of a group.

    Args:
        sizes: symbolic sizes that the subgraph is given beside its inputs.
        replaced: what was put in the place of nodes before, and now.
    """
    for each in group:
        inside = set(each.nodes)
        inputs = [replaced.get(node, node) for node in (*each.inputs, *sizes)]
        if each is group[0]:
            gm.add_submodule(name, subgraph(gm, each.nodes, returned, inputs))
        with gm.graph.inserting_before(each.nodes[0]):
            layer = gm.graph.get_attr(name)
            call = gm.graph.call_function(invoke_subgraph, (layer, name, *inputs))
            for number, place in enumerate(returned):
                node = each.nodes[place]
                result = gm.graph.call_function(operator.getitem, (call, number))
                result.meta = dict(node.meta)
                node.replace_all_uses_with(result, delete_user_cb=lambda user, inside=inside: user not in inside)  # type: ignore[misc]
                replaced[node] = result
        for node in reversed(each.nodes):
            gm.graph.erase_node(node)


def subgraph(gm: fx.GraphModule, nodes: list[fx.Node], returned: list[int], inputs: list[fx.Node]) -> fx.GraphModule:
    """The nodes as a graph of its own: inputs -> what is read outside."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        placeholder = graph.placeholder(f"input_{number}")
        placeholder.meta = dict(node.meta)
        copies.setdefault(node, placeholder)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(tuple(copies[nodes[place]] for place in returned))
    return fx.GraphModule(gm, graph)
