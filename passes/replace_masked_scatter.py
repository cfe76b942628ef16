"""Write masked_scatter with fixed shapes, counting rows instead of elements.

    before: out [B, S, D] = masked_scatter(x [B, S, D], mask [B, S, 1], rows [V, D])
    after:  rank [B * S]  = clamp(cumsum(mask) - 1, 0)
            out  [B, S, D] = where(mask, rows[rank], x)

Numerics are unchanged: the n-th place of the mask takes the n-th row. masked_scatter itself counts all B * S * D
places, one after another on a CPU and in int64 on a GPU; and it becomes NonZero in an export, which some targets lack.
"""

from typing import Any

import torch
from torch import fx

from hawk_compile.passes.compat import TO_COPY
from hawk_compile.passes.graph import Builder, is_call, same, shape_of


def replace_masked_scatter(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Replace every masked_scatter of rows into [B, S, D]; others are left alone."""
    for node in list(gm.graph.nodes):
        if is_call(node, "masked_scatter") and can_replace(node):
            rewrite(gm, node)
    return gm


def can_replace(node: fx.Node) -> bool:
    """Whether the mask has one value per row: the last dimension is 1, or the same value throughout by `expand`."""
    values, mask = node.args[:2]
    if len(shape_of(values)) != 3 or len(shape_of(mask)) != 3:
        return False
    while isinstance(mask, fx.Node) and is_call(mask, "to", TO_COPY, "clone", "contiguous", "alias"):
        mask = mask.args[0]
    return same(shape_of(mask)[-1], 1) or (isinstance(mask, fx.Node) and is_call(mask, "expand", "expand_as"))


def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
    build = Builder(gm, node)
    values, mask, source = node.args
    rows, length, width = (build.size_of(values, dim) for dim in range(3))  # type: ignore[arg-type]
    of_row = build.call(torch.ops.aten.select.int, mask, -1, 0)
    flat = build.call(torch.ops.aten.reshape.default, of_row, [-1])
    count = build.call(torch.ops.aten.cumsum.default, build.call(torch.ops.aten.to.dtype, flat, torch.int64), 0)
    rank = build.call(torch.ops.aten.clamp_min.default, build.call(torch.ops.aten.sub.Tensor, count, 1), 0)
    given = build.call(torch.ops.aten.reshape.default, source, [-1, width])
    taken = build.call(torch.ops.aten.index_select.default, given, 0, rank)
    placed = build.call(torch.ops.aten.reshape.default, taken, [rows, length, width])
    here = build.call(torch.ops.aten.unsqueeze.default, of_row, -1)
    result = build.call(torch.ops.aten.where.self, here, placed, values)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
