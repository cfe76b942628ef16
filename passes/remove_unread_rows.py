"""Remove rows that a mask picks and of which nothing but the number is looked at.

    before: rows = embeds[mask]              [u]: on a GPU the host waits for the number
            assert size(rows, 0) >= 0
    after:  neither

Models compare that number with the number of their features, which is done on the host before the graph runs. Numerics
are unchanged.
"""

from typing import Any

import torch
from torch import fx

from hawk_compile.passes.compat import CHECK_NAMES
from hawk_compile.passes.graph import dependents, expr, is_call, op_name, output_node, tensor, value


def remove_unread_rows(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Erase every such selection, with the sizes and checks that are computed from it."""
    for node in reversed(list(gm.graph.nodes)):
        if picks_rows(node) and is_unread(gm.graph, node):
            for part in reversed([each for each in gm.graph.nodes if each in dependents(node)]):
                gm.graph.erase_node(part)
            gm.graph.erase_node(node)
    return gm


def picks_rows(node: fx.Node) -> bool:
    """Whether the node is `values[mask]`."""
    if not is_call(node, "getitem", "index", "masked_select"):
        return False
    index = node.args[1]
    masks = [tensor(each) for each in (index if isinstance(index, (tuple, list)) else (index,))]
    return any(mask is not None and mask.dtype is torch.bool for mask in masks)


def is_unread(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether only sizes and checks come of a node, and no other value has a size of its."""
    after = dependents(node)
    if after.intersection(output_node(graph).all_input_nodes):
        return False
    if not all(is_size(each) or op_name(each).startswith(CHECK_NAMES) for each in after):
        return False
    own = symbols_of(node) - set().union(*(symbols_of(source) for source in node.all_input_nodes))
    return not any(own & symbols_of(each) for each in graph.nodes if each is not node and each not in after)


def is_size(node: fx.Node) -> bool:
    """Whether a node gives a size, or a comparison of sizes."""
    return tensor(node) is None and value(node) is not None


def symbols_of(node: fx.Node) -> set[Any]:
    """The symbols in the sizes of a node's tensor."""
    found = tensor(node)
    sizes = () if found is None else map(expr, found.shape)
    return set().union(*(size.free_symbols for size in sizes if size is not None))
