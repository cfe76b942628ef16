"""Replace "add these rows where the mask holds" by arithmetic of fixed shape.

    before: part [n, D] = hidden[mask]                   n is read back from the device
            hidden' = written(hidden, [mask], part + features)   features [V, D], V = n; or index_put
    after:  index [B, S]    = running count of mask - 1
            placed [B, S, D] = features[index]
            hidden'         = where(mask, hidden + placed, hidden)

Numerics stay the same, bit for bit. Models that add visual features to later layers write it in the first way, which
stalls the device once for each such layer and gives the graph a size that no other value has. An index that is not a
single [B, S] mask, and a part that is used in another way, are left alone.
"""

from typing import Any

import torch
from torch import fx

from hawk_compile.passes.graph import Builder, dependents, in_order, is_call, name_of, tensor
from hawk_compile.passes.written import Written


def replace_masked_add(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Rewrite every such addition in the graph."""
    for write in list(gm.graph.nodes):
        found = masked_add(write)
        if found is not None:
            rewrite(gm, write, *found)
    return gm


def mask_of(index: Any) -> fx.Node | None:
    """The mask [B, S] of an index `[mask]` or `[mask, :, ...]`."""
    first, *rest = index if isinstance(index, (tuple, list)) else (index,)
    found = tensor(first)
    if found is None or found.dtype is not torch.bool or found.ndim != 2:
        return None
    return first if all(each == slice(None) or each is None for each in rest) else None


def masked_add(write: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(part, sum, features) of `hidden[mask] = hidden[mask] + features`, or None if the node is nothing of the kind."""
    hidden, index, total = arguments(write) or (None, None, None)
    mask = mask_of(index)
    if mask is None or not isinstance(total, fx.Node) or not is_call(total, "add", "iadd") or len(total.args) != 2:
        return None
    for part, features in (total.args, total.args[::-1]):
        if not isinstance(part, fx.Node) or not isinstance(features, fx.Node):
            continue
        reads = is_call(part, "getitem", "index") and part.args[0] is hidden and mask_of(part.args[1]) is mask
        if reads and set(total.users) == {write} and not tensors_of(part, total):
            return part, total, features
    return None


def arguments(write: fx.Node) -> tuple[Any, ...] | None:
    """(hidden, index, rows) of a node that puts rows where an index says, into all of a tensor; None of other nodes."""
    if is_call(write, "index_put"):
        return write.args if len(write.args) == 3 else None
    written = write.target
    if not isinstance(written, Written) or written.views or name_of(written.write) not in ("setitem", "index_put_"):
        return None
    base, _, args, _ = write.args
    return (base, *args[1:]) if len(args) == 3 else None  # type: ignore[arg-type,index,misc]


def tensors_of(part: fx.Node, total: fx.Node) -> list[fx.Node]:
    """What is computed from the part's elements apart from the sum; its size may be looked at and checked."""
    beside = dependents(part) - dependents(total) - {total}
    return [node for node in beside if tensor(node) is not None]


def rewrite(gm: fx.GraphModule, write: fx.Node, part: fx.Node, total: fx.Node, features: fx.Node) -> None:
    hidden, index, _ = arguments(write) or (None, None, None)
    assert isinstance(hidden, fx.Node)
    mask = mask_of(index)
    build = Builder(gm, write)
    count = build.call(torch.cumsum, build.call(torch.flatten, mask), 0)
    rank = build.call(torch.clamp_min, build.call(torch.sub, count, 1), 0)
    placed = build.call(torch.index_select, features, 0, rank)
    aligned = build.call(torch.reshape, placed, tuple(build.size_of(hidden, dim) for dim in range(3)))
    added = build.call(torch.add, hidden, aligned)
    result = build.call(torch.where, build.call(torch.unsqueeze, mask, -1), added, hidden)
    write.replace_all_uses_with(result)
    unused = in_order(gm.graph, dependents(part) - dependents(write) - {write})
    for node in [write, *reversed(unused), part]:
        gm.graph.erase_node(node)
