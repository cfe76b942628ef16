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
from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import Builder, expr, output_node, same, shape_of, sizes_equal_to, tensor, value
from hawk_compile.passes.site import Site, site_of


def gather_by_shape(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Gather every value that crosses from full length to pruned length; `site.gathered` lists them.

    Raises:
        ShapeError: a value crosses whose shape depends on S or V in a way that no gather expresses.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if site.gathered:
        return gm
    crossing = Crossing(Builder(gm, site.boundary), site)
    output = output_node(gm.graph)
    behind = False
    for node in list(gm.graph.nodes):
        behind = behind or node is site.boundary
        if behind and node is not output:
            for source in node.all_input_nodes:
                if source in site.full:
                    node.replace_input_with(source, crossing.of(source))
            replace_numbers(node, site)
    if site.merged in output.all_input_nodes:
        # The decoder's first hidden state. Everything else that the caller gets from before the cut stays whole.
        output.replace_input_with(site.merged, crossing.of(site.merged))
    return gm


class Crossing:
    """The pruned stand-in of each value that crosses, made once."""

    def __init__(self, build: Builder, site: Site):
        self.build = build
        self.site = site
        assert site.keep is not None
        self.keep = site.keep
        self.made: dict[fx.Node, fx.Node] = {}
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
        known = [(self.site.length, self.site.kept_length)]
        if len(self.site.visual) == 1:
            known.append((self.site.visual[0], self.site.kept_visual))
        for size, kept in known:
            more = expr(found) - expr(size)  # type: ignore[operator]
            if more.is_Integer and isinstance(size, SymInt):
                return self.record(node, (), "length", self.build.size(operator.add, kept, int(more)))
        if not self.depends_on_length(found):
            return node
        if not node.all_input_nodes or any(tensor(source) is not None for source in node.all_input_nodes):
            raise ShapeError(
                f"{node.name} is the size {expr(found)}, which depends on the prompt length in an unknown way"
            )
        copies = self.build.clone([node], {source: self.of(source) for source in node.all_input_nodes})
        return copies[node]

    def depends_on_length(self, size: Any) -> bool:
        known = [expr(size) for size in (self.site.length, *self.site.visual)]
        symbols = set().union(*(found.free_symbols for found in known if found is not None))
        found = expr(size)
        return found is not None and bool(found.free_symbols & symbols)

    def of_tensor(self, node: fx.Node, found: Tensor) -> fx.Node:
        result, site = node, self.site
        lengths = sizes_equal_to(found.shape, site.length)
        if lengths and site.ambiguous and is_features(found) and not sizes_equal_to(found.shape, site.rows):
            raise ShapeError(
                f"{node.name} {tuple(found.shape)} crosses into the decoder; this batch has as many visual tokens as "
                "positions, so it cannot be told whether it has one row per visual token: pad the prompts by one "
                "position, or use hawk_compile.optimize, which keeps the two sizes apart"
            )
        for dim in lengths:
            result = self.gather_tokens(result, dim, lengths[0])
        if node is site.padding_mask:
            result = self.build.call(torch.mul, result, site.valid)
        if lengths:
            self.record(node, tuple(found.shape), "tokens", result)
        elif len(site.visual) == 1 and (dims := sizes_equal_to(found.shape, site.visual[0])) and is_features(found):
            result = self.gather_visual(node, found, dims)
            self.record(node, tuple(found.shape), "visual tokens", result)
        for size in shape_of(result):
            if self.depends_on_length(size) and not self.is_kept(size):
                raise ShapeError(
                    f"{node.name} {tuple(found.shape)} crosses into the decoder with the size {expr(size)}, which "
                    "depends on the prompt length but is not it; only S and V can be gathered"
                )
        return result

    def is_kept(self, size: Any) -> bool:
        known = (self.site.kept_length, self.site.kept_visual)
        return any(same(size, value(kept) if isinstance(kept, fx.Node) else kept) for kept in known)

    def gather_tokens(self, node: fx.Node, dim: int, first: int) -> fx.Node:
        """Gather dimension `dim` (size S) of a value by each row's kept positions."""
        shape = shape_of(node)
        if same(self.site.rows, 1):
            return self.build.call(torch.index_select, node, dim, self.build.call(torch.select, self.keep, 0, 0))
        batch = next((left for left in reversed(range(first)) if same(shape[left], self.site.rows)), None)
        if batch is None:
            shared = next((left for left in reversed(range(first)) if same(shape[left], 1)), None)
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
        if not isinstance(self.site.visual[0], SymInt):
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
        call, site = self.build.call, self.site
        mask = call(torch.flatten, site.visual_mask)
        rank = call(torch.sub, call(torch.cumsum, mask, 0), 1)
        ranks = call(torch.reshape, rank, (self.build.size_of(site.merged, 0), self.build.size_of(site.merged, 1)))
        kept_rank = call(torch.flatten, call(torch.ops.hawk.gather.default, ranks, self.keep))
        kept_mask = call(torch.ops.hawk.gather.default, site.visual_mask, self.keep)
        kept = call(torch.flatten, call(torch.logical_and, kept_mask, site.valid))
        # The n-th kept one goes to slot n; all others go to one slot more, which is cut off. No sort: targets limit it.
        size = self.build.size(operator.add, site.kept_visual, 1)
        slot = call(torch.where, kept, call(torch.sub, call(torch.cumsum, kept, 0), 1), site.kept_visual)
        slots = call(torch.scatter, call(torch.ops.aten.new_zeros.default, kept_rank, [size]), 0, slot, kept_rank)
        return call(operator.getitem, slots, slice(None, site.kept_visual))

    def record(self, node: fx.Node, shape: tuple[Any, ...], kind: str, result: Any) -> Any:
        self.site.gathered.append((node.name, shape, kind))
        return result


def is_features(found: Tensor) -> bool:
    """Whether a value with a dimension V can hold features: a weight that is as wide by chance cannot."""
    return found.ndim >= 2 and found.is_floating_point() and not isinstance(found, torch.nn.Parameter)


def replace_numbers(node: fx.Node, site: Site) -> None:
    """Where S is a fixed number of the graph, put S' in its place among the arguments."""
    if isinstance(site.length, SymInt) or not isinstance(site.kept_length, int):
        return

    def swap(argument: Any) -> Any:
        if isinstance(argument, slice):
            return slice(swap(argument.start), swap(argument.stop), swap(argument.step))
        if isinstance(argument, (tuple, list)):
            return type(argument)(swap(each) for each in argument)
        return site.kept_length if type(argument) is int and argument == site.length else argument

    node.args = swap(node.args)
    node.kwargs = {name: swap(argument) for name, argument in node.kwargs.items()}
