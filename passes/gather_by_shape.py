"""Let everything behind the merge run at the pruned length: gather what crosses over, by its symbolic shape.

    before: merged [B, S, D], positions [4, B, S], mask [B, S], deep [V, D], S   -> decoder
    after:  merged [B, S', D], positions [4, B, S'], mask [B, S'], deep [V', D], S' -> decoder

A dimension equal to S is gathered by the kept positions (each row by its own: the dimension of size B left of it, or
one that all rows share, which is expanded), a dimension equal to V by the kept visual tokens; a size computed from S or
V is computed from S' and V'. The padding mask is also closed at positions that only fill a row up. No other node
changes: masks, rotary tables and cache updates are built from these values and follow.
"""

import operator
from typing import Any

import torch
from torch import SymInt, Tensor, fx

import hawk_compile.kernels.gather.op  # noqa: F401  registers the operator
from hawk_compile.passes.compat import TO_COPY
from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import (
    LAYOUT_OPS,
    Builder,
    ancestors,
    dependents,
    expr,
    is_call,
    output_node,
    same,
    shape_of,
    sizes_equal_to,
    tensor,
    value,
)
from hawk_compile.passes.site import Budgeted, Gathered, Located, Scored, Selected, Split, find, note, read


def gather_by_shape(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Gather every value that crosses from full length to pruned length, and note which they are.

    Raises:
        ShapeError: a value crosses whose shape depends on S or V in a way that no gather expresses.
    """
    if find(gm, Gathered) is not None:
        return gm
    located, split, budgeted = read(gm, Located), read(gm, Split), read(gm, Budgeted)
    crossing = Crossing(Builder(gm, split.boundary), located, read(gm, Scored), budgeted, read(gm, Selected))
    output = output_node(gm.graph)
    behind = False
    for node in list(gm.graph.nodes):
        behind = behind or node is split.boundary
        if behind and node is not output:
            for source in node.all_input_nodes:
                if source in split.full:
                    node.replace_input_with(source, crossing.of(source))
            replace_numbers(node, located.length, budgeted.kept_length)
    for node in output.all_input_nodes:
        # The decoder's hidden states up to the cut. Everything else that the caller gets from before it stays whole.
        if node is located.merged or (node in split.full and is_hidden_state(node, located)):
            output.replace_input_with(node, crossing.of(node))
    note(gm, Gathered(tuple(crossing.gathered)))
    return gm


class Crossing:
    """The pruned stand-in of each value that crosses, made once."""

    def __init__(self, build: Builder, located: Located, scored: Scored, budgeted: Budgeted, selected: Selected):
        self.build = build
        self.located, self.scored, self.budgeted, self.selected = located, scored, budgeted, selected
        self.keep = selected.keep
        self.made: dict[fx.Node, fx.Node] = {}
        self.gathered: list[tuple[str, tuple[Any, ...], str]] = []
        self.kept_visual_index: fx.Node | None = None

    def of(self, node: fx.Node) -> Any:
        if node not in self.made:
            found = value(node)
            if isinstance(found, Tensor):
                self.made[node] = self.of_tensor(node, found)
            elif isinstance(found, (SymInt, int)):
                self.made[node] = self.of_size(node, found)
            else:
                self.made[node] = node
        return self.made[node]

    def of_size(self, node: fx.Node, found: Any) -> Any:
        """S' + n for S + n, V' + n for V + n, and an expression of such sizes computed again from its parts."""
        known = [(self.located.length, self.budgeted.kept_length)]
        if len(self.located.visual) == 1:
            known.append((self.located.visual[0], self.budgeted.kept_visual))
        for size, kept in known:
            more = expr(found) - expr(size)  # type: ignore[operator]
            if more.is_Integer and isinstance(size, SymInt):
                return self.record(node, (), "length", self.build.size(operator.add, kept, int(more)))
        if not self.depends_on_length(found):
            return node
        if not node.all_input_nodes or any(tensor(source) is not None for source in node.all_input_nodes):
            raise ShapeError(
                f"{node.name} is the size {expr(found)}, which depends on the prompt length in an unknown way: call "
                "hawk_compile.restore(model) to run the model whole"
            )
        copies = self.build.clone([node], {source: self.of(source) for source in node.all_input_nodes})
        return copies[node]

    def depends_on_length(self, size: Any) -> bool:
        known = [expr(size) for size in (self.located.length, *self.located.visual)]
        symbols = set().union(*(found.free_symbols for found in known if found is not None))
        found = expr(size)
        return found is not None and bool(found.free_symbols & symbols)

    def of_tensor(self, node: fx.Node, found: Tensor) -> fx.Node:
        result, located = node, self.located
        lengths = sizes_equal_to(found.shape, located.length)
        if lengths and located.ambiguous and is_features(found) and not sizes_equal_to(found.shape, located.rows):
            raise ShapeError(
                f"{node.name} {tuple(found.shape)} crosses into the decoder; this batch has as many visual tokens as "
                "positions, so it cannot be told whether it has one row per visual token: pad the prompts by one "
                "position, or use hawk_compile.optimize, which keeps the two sizes apart"
            )
        for dim in lengths:
            result = self.gather_tokens(result, dim, lengths[0])
        if node is located.padding_mask:
            result = self.build.call(torch.mul, result, self.selected.valid)
        elif lengths == [1] and marks_visual_tokens(node, located):
            result = self.build.call(torch.logical_and, result, self.valid_for(len(found.shape)))
        if lengths:
            self.record(node, tuple(found.shape), "tokens", result)
        elif len(located.visual) == 1 and is_features(found) and sizes_equal_to(found.shape, located.visual[0]):
            result = self.gather_visual(node, found, sizes_equal_to(found.shape, located.visual[0]))
            self.record(node, tuple(found.shape), "visual tokens", result)
        for size in shape_of(result):
            if self.depends_on_length(size) and not self.is_kept(size):
                raise ShapeError(
                    f"{node.name} {tuple(found.shape)} crosses into the decoder with the size {expr(size)}, which "
                    "depends on the prompt length but is not it, and only S and V can be gathered: call "
                    "hawk_compile.restore(model) to run the model whole"
                )
        return result

    def is_kept(self, size: Any) -> bool:
        known = (self.budgeted.kept_length, self.budgeted.kept_visual)
        return any(same(size, value(kept) if isinstance(kept, fx.Node) else kept) for kept in known)

    def valid_for(self, dims: int) -> fx.Node:
        """Which kept positions are tokens, [B, S', 1, ...] of as many dimensions."""
        valid = self.selected.valid
        for _ in range(dims - 2):
            valid = self.build.call(torch.unsqueeze, valid, -1)
        return valid

    def gather_tokens(self, node: fx.Node, dim: int, first: int) -> fx.Node:
        """Gather dimension `dim` (size S) of a value by each row's kept positions."""
        shape = shape_of(node)
        if same(self.located.rows, 1):
            return self.build.call(torch.index_select, node, dim, self.build.call(torch.select, self.keep, 0, 0))
        batch = next((left for left in reversed(range(first)) if same(shape[left], self.located.rows)), None)
        if batch is None:
            # Positions are [..., B, S], tables [B, heads, S, d].
            ones = [left for left in range(first) if same(shape[left], 1)]
            shared = (ones[-1] if first == len(shape) - 1 else ones[0]) if ones else None
            if shared is None:
                raise ShapeError(
                    f"{node.name} {tuple(shape)} is shared by all rows of a batch without a dimension for rows, so "
                    "rows cannot keep different positions; give position_ids and attention_mask of shape [B, S]"
                )
            sizes: list[Any] = [-1] * len(shape)
            sizes[shared] = self.build.size_of(self.keep, 0)
            node, batch = self.build.call(torch.ops.aten.expand.default, node, sizes), shared
        rows_first = self.build.call(torch.movedim, node, (batch, dim), (0, 1))
        kept = self.build.call(torch.ops.hawk.gather.default, rows_first, self.keep)
        return self.build.call(torch.movedim, kept, (0, 1), (batch, dim))

    def gather_visual(self, node: fx.Node, found: Tensor, dims: list[int]) -> fx.Node:
        """Gather dimension V of a value by the kept visual tokens, in the order of rows and positions."""
        if not isinstance(self.located.visual[0], SymInt):
            raise ShapeError(
                f"{node.name} {tuple(found.shape)} crosses into the decoder with one row per visual token, and their "
                "number is fixed in this graph: capture it with a symbolic number, as hawk_compile.optimize does"
            )
        if self.kept_visual_index is None:
            self.kept_visual_index = self.index_of_kept_visual()
        for dim in dims:
            node = self.build.call(torch.index_select, node, dim, self.kept_visual_index)
        return node

    def index_of_kept_visual(self) -> fx.Node:
        """[V'] int64 into the V visual tokens: ascending, without reading a count from the device."""
        call, located, scored = self.build.call, self.located, self.scored
        mask = call(torch.flatten, scored.visual_mask)
        rank = call(torch.sub, call(torch.cumsum, mask, 0), 1)
        ranks = call(torch.reshape, rank, tuple(self.build.size_of(located.merged, dim) for dim in (0, 1)))
        kept_rank = call(torch.flatten, call(torch.ops.hawk.gather.default, ranks, self.keep))
        kept_mask = call(torch.ops.hawk.gather.default, scored.visual_mask, self.keep)
        kept = call(torch.flatten, call(torch.logical_and, kept_mask, self.selected.valid))
        # The n-th kept one goes to slot n; all others go to one slot more, which is cut off. No sort: targets limit it.
        size = self.build.size(operator.add, self.budgeted.kept_visual, 1)
        slot = call(torch.where, kept, call(torch.sub, call(torch.cumsum, kept, 0), 1), self.budgeted.kept_visual)
        slots = call(torch.scatter, call(torch.ops.aten.new_zeros.default, kept_rank, [size]), 0, slot, kept_rank)
        return call(operator.getitem, slots, slice(None, self.budgeted.kept_visual))

    def record(self, node: fx.Node, shape: tuple[Any, ...], kind: str, result: Any) -> Any:
        self.gathered.append((node.name, shape, kind))
        return result


def is_hidden_state(node: fx.Node, located: Located) -> bool:
    """Whether a value before the cut is one of the residual stream's: of the merged embeddings, and of their shape."""
    if located.entry is located.merged or tensor(node) is None or node not in dependents(located.merged):
        return False
    return len(shape_of(node)) == 3 and all(map(same, shape_of(node), shape_of(located.merged)))


def marks_visual_tokens(node: fx.Node, located: Located) -> bool:
    """Whether a mask says where visual tokens stand, in a prompt that may be padded.

    Padding may hold placeholders: those that only fill a row up have no features behind the cut.
    """
    found = tensor(node)
    if located.padding_mask is None or found is None or found.dtype is not torch.bool:
        return False
    sources = ancestors(node)
    return located.padding_mask not in sources and any(placed(merge) in sources for merge in located.merges)


def placed(merge: fx.Node) -> fx.Node:
    """The [B, S] value that a merge's mask is made of by layout alone."""
    mask: Any = merge.args[1]
    while is_call(mask, "unsqueeze", "expand", "expand_as", "to", TO_COPY, *LAYOUT_OPS) and len(shape_of(mask)) > 2:
        mask = mask.args[0]
    return mask


def is_features(found: Tensor) -> bool:
    """Whether a value with a dimension V can hold features: a weight that is as wide by chance cannot."""
    return found.ndim >= 2 and found.is_floating_point() and not isinstance(found, torch.nn.Parameter)


def replace_numbers(node: fx.Node, length: Any, kept_length: Any) -> None:
    """Where S is a fixed number of the graph, put S' in its place among the arguments."""
    if isinstance(length, SymInt) or not isinstance(kept_length, int):
        return

    def swap(argument: Any) -> Any:
        if isinstance(argument, slice):
            return slice(swap(argument.start), swap(argument.stop), swap(argument.step))
        if isinstance(argument, (tuple, list)):
            return type(argument)(swap(part) for part in argument)
        return kept_length if type(argument) is int and argument == length else argument

    node.args = swap(node.args)
    node.kwargs = {name: swap(argument) for name, argument in node.kwargs.items()}
