"""Compare slots with slots: a query's slot stands where a model takes its position for it.

    before: future [B, 1, S, K] = keys' slots [1, 1, 1, K] > positions [B, 1, S, 1]
    after:  future [B, 1, S, K] = keys' slots [1, 1, 1, K] > queries' slots [B, 1, S, 1]

A slot is a token's place among the K = P + S keys that are held; its position is what it is rotated by. Without padding
the two are equal as long as no token is removed, so numerics are unchanged there; behind the cut only slots are counted
anew. Rotations keep the positions.
"""

import operator
from typing import Any

import torch
from torch import fx

from hawk_compile.passes.graph import Builder, tensor
from hawk_compile.passes.site import Located, read
from hawk_compile.passes.slots import positions_compared_with_slots, refuse_positions_as_indices


def compare_slots(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Rewrite every comparison of slots with positions.

    Raises:
        GraphError: the graph computes with positions as with slots in another way, too.
    """
    located = read(gm, Located)
    compared = positions_compared_with_slots(gm.graph, set(located.position_chain), located.length)
    for node, positions in compared:
        rewrite(gm, node, positions)
    if compared:
        refuse_positions_as_indices(gm.graph, located.merged, set(located.position_chain))
    return gm


def rewrite(gm: fx.GraphModule, node: fx.Node, positions: fx.Node) -> None:
    build = Builder(gm, node)
    keys = next(source for source in node.all_input_nodes if source is not positions)
    found = tensor(positions)
    assert found is not None
    slots = build.size_of(keys, -1)
    before = build.size(operator.sub, slots, build.size_of(positions, -2))
    counted = build.call(torch.arange, before, slots, device=found.device)
    column = build.call(torch.reshape, counted, [*[1] * (found.ndim - 2), -1, 1])
    sizes = [build.size_of(positions, dim) for dim in range(found.ndim)]
    node.replace_input_with(positions, build.call(torch.ops.aten.expand.default, column, sizes))
