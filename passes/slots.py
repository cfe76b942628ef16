"""Positions and slots: both are counted by aranges over S, and after pruning they are no longer the same.

A token keeps its *position*, by which it is rotated; its *slot* is its place among the keys that are held, by which
masks are built. Positions stay at full length until they are gathered; slots are counted anew at the pruned length.
"""

from typing import Any

import torch
from torch import fx

from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import dependents, expr, is_call, op_name, same, shape_of, sizes_equal_to, tensor

POSITIONS = "position_ids"
"""Every Hugging Face model calls its positions [..., S] so."""
WRITES = ("written", "setitem", "index_put", "scatter")
ORDERS = ("gt", "lt", "ge", "le", "greater", "less", "greater_equal", "less_equal")


def find_position_chain(graph: fx.Graph, merged: fx.Node, length: Any) -> set[fx.Node]:
    """The positions ([S] or [1, ..., S]) that the graph counts itself and that do more than build masks.

    An arange over S that reaches the decoder only as an attention's mask, or compared with that of the keys (an
    indexer's mask, a bias by distance), counts slots, and is counted anew at the pruned length; one that reaches
    anything else counts positions, which stay at full length until they are gathered. Nor is it positions where it
    numbers places that the decoder computes, as the inverse of an order in which experts take tokens does.
    """
    after = dependents(merged)
    chain: set[fx.Node] = set()
    for node in graph.nodes:
        found = tensor(node)
        if not is_call(node, "arange") or found is None or not sizes_equal_to(found.shape, length):
            continue
        beside = uncompared(node, after, length)
        entered = {user for source in beside for user in source.users if user in after}
        if all(is_call(user, "scaled_dot_product_attention") or orders_tokens(user, after) for user in entered):
            continue
        stack = [node]
        while stack:
            current = stack.pop()
            if current in beside and current not in chain and is_row_of_positions(current, length):
                chain.add(current)
                # A row [1, S] goes on as one of [axes, rows, S] or of [rows, 1, S]: it is left to the graph as it is.
                stack.extend(user for user in current.users if len(shape_of(current)) == 1 or is_flat(user))
    return chain


def orders_tokens(node: fx.Node, after: set[fx.Node]) -> bool:
    """Whether a node writes into places that are computed in the decoder."""
    places = (found for source in node.all_input_nodes if source in after and (found := tensor(source)) is not None)
    return is_call(node, *WRITES) and any(not found.is_floating_point() for found in places)


def is_flat(node: fx.Node) -> bool:
    found = tensor(node)
    return found is not None and found.ndim <= 2


def uncompared(node: fx.Node, after: set[fx.Node], length: Any) -> set[fx.Node]:
    """The node and all that is computed from it beside the decoder, without what says which keys a query sees."""
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in found | after and user.op != "output" and not compares_slots(user, length):
                found.add(user)
                stack.append(user)
    return found


def compares_slots(node: fx.Node, length: Any) -> bool:
    """Whether a value is [..., S, P + S] of bools or of distances: P slots may be filled, and a cache counts slots."""
    found = tensor(node)
    if found is None or found.is_floating_point() or found.ndim < 2 or not same(found.shape[-2], length):
        return False
    symbols: set[Any] = getattr(expr(length), "free_symbols", set())
    return same(found.shape[-1], length) or bool(symbols & getattr(expr(found.shape[-1]), "free_symbols", set()))


def is_row_of_positions(node: fx.Node, length: Any) -> bool:
    found = tensor(node)
    if found is None or sizes_equal_to(found.shape, length) != [found.ndim - 1]:
        return False
    return all(same(size, 1) for size in found.shape[:-1])


def positions_compared_with_slots(graph: fx.Graph, chain: set[fx.Node], length: Any) -> list[tuple[fx.Node, fx.Node]]:
    """(comparison, its positions) wherever a graph asks which slots of keys come before a position [..., S, 1]."""
    positions = derived_from(positions_in(graph, chain))
    slots = derived_from({node for node in graph.nodes if is_call(node, "arange") and node not in positions})
    found = []
    for node in graph.nodes:
        sources = node.all_input_nodes
        if not is_call(node, *ORDERS) or len(sources) != 2 or not compares_slots(node, length):
            continue
        left = [each for each in sources if each in positions - slots]
        if len(left) == 1 and any(each in slots - positions for each in sources):
            found.append((node, left[0]))
    return found


def positions_in(graph: fx.Graph, chain: set[fx.Node]) -> set[fx.Node]:
    """The positions that a graph is given or counts itself."""
    given = [node for node in graph.find_nodes(op="placeholder") if POSITIONS in node.name and tensor(node) is not None]
    return {*chain, *given}


def derived_from(nodes: set[fx.Node]) -> set[fx.Node]:
    return nodes.union(*map(dependents, nodes))


def refuse_positions_as_indices(graph: fx.Graph, merged: fx.Node, chain: set[fx.Node]) -> None:
    """Refuse a decoder that computes with integers which it takes from positions: it counts keys by them.

    Raises:
        GraphError: it does, and names what reads them.
    """
    after, stack = dependents(merged), [*positions_in(graph, chain)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for user in node.users:
            found = tensor(user)
            if user in after:
                raise GraphError(
                    f"{user.name} = {op_name(user)}(...) computes with the positions of tokens ({node.name}) as with "
                    "slots of the cache, which they are no longer once tokens are removed: this model's attention to "
                    "blocks of keys needs every position to be there, so it cannot be pruned: call "
                    "hawk_compile.restore(model) to run it whole"
                )
            if found is not None and user not in seen and not found.is_floating_point() and found.dtype != torch.bool:
                seen.add(user)
                stack.append(user)
