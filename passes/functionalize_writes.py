"""Write every write in place as a new value, so that a value's inputs are all that it is computed from.

    before: key = new_empty(...); part = key[..., :n]; part.copy_(a); key[..., n:] = b     | reader(key)
    after:  key  = new_empty(...)
            key1 = written(key, a)       what `key` holds after the first write: a copy, written in one part
            key2 = written(key1, b)                                                        | reader(key2)

Memory that the graph itself makes is followed through views (whatever shares storage, as the graph's fake values tell);
what reads it after a write reads the new value, by views that are made again. Numerics are unchanged, and a compiler
behind writes in place again where it can. Writes into inputs of the graph (a cache's own tensors) are effects and stay.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from hawk_compile.passes.compat import OpOverload
from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import Builder, memories, op_name, run_on_values, value, written_by
from hawk_compile.passes.written import Target, Written, with_part


def functionalize_writes(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Replace every write into memory of the graph's own by a new value.

    Raises:
        GraphError: a write that cannot be followed: into several tensors at once, into a tensor's own shape, or through
            an operator that shares memory with something that is not its input.
    """
    if any(written_by(node) for node in gm.graph.nodes):
        follower = Follower(gm)
        for node in list(gm.graph.nodes):
            follower.visit(node)
    return gm


class Follower:
    """Walks a graph in its order and knows, of all memory, which node stands for what it holds by now."""

    def __init__(self, gm: fx.GraphModule):
        self.build = Builder(gm, next(iter(gm.graph.nodes)))
        self.owner: dict[int, fx.Node] = {}
        """The first node that holds a storage: what made it, or an input of the graph."""
        self.owners: dict[fx.Node, set[fx.Node]] = {}
        """The owners of all memory that a node's value shares."""
        self.whole: dict[fx.Node, fx.Node] = {}
        """The owner whose memory, all of it, a node stands for: the owner itself, and what each write made of it."""
        self.current: dict[fx.Node, fx.Node] = {}
        """What an owner's memory holds by now."""
        self.writes: dict[fx.Node, int] = {}
        """How often an owner's memory was written."""
        self.made: dict[fx.Node, int] = {}
        """How many writes into its memory a node saw."""
        self.again: dict[fx.Node, fx.Node] = {}
        """The newest copy of a view."""

    def visit(self, node: fx.Node) -> None:
        self.build.before = node
        for source in node.all_input_nodes:
            if self.is_stale(source):
                node.replace_input_with(source, self.fresh(source))
        if op_name(node) == "detach_":  # writes no element
            node.target = "detach" if node.op == "call_method" else torch.ops.aten.detach.default
        written = [target for target in written_by(node) if self.is_own(target)]
        if not written:
            self.register(node)
        elif len(written) == 1 and not changes_shape(node):
            self.replace(node, written[0])
        else:
            raise GraphError(
                f"{node.name} = {op_name(node)} writes in place into {', '.join(each.name for each in written)}, which "
                "cannot be followed: write it with the operator that returns a new tensor"
            )

    def register(self, node: fx.Node) -> None:
        found = value(node)
        shared = {self.owner[memory] for memory in memories(found) if memory in self.owner}
        if isinstance(found, Tensor) and not shared:
            shared = {node}
            self.owner |= dict.fromkeys(memories(found), node)
            self.whole[node], self.current[node], self.writes[node] = node, node, 0
        self.note(node, shared)

    def note(self, node: fx.Node, owners: set[fx.Node]) -> None:
        self.owners[node] = owners
        self.made[node] = sum(self.writes[owner] for owner in owners)

    def is_own(self, node: fx.Node) -> bool:
        """Whether its memory is made by the graph itself."""
        return any(owner.op not in ("placeholder", "get_attr") for owner in self.owners.get(node, ()))

    def is_stale(self, node: fx.Node) -> bool:
        return node in self.made and self.made[node] < sum(self.writes[owner] for owner in self.owners[node])

    def fresh(self, node: fx.Node) -> fx.Node:
        """The same view of what its memory holds by now."""
        if node in self.whole:
            return self.current[self.whole[node]]
        known = self.again.get(node)
        if known is not None and not self.is_stale(known):
            return known
        shared = {source for source in node.all_input_nodes if self.owners[source] & self.owners[node]}
        if not shared:
            (owner, *_) = self.owners[node]
            raise GraphError(
                f"{node.name} = {op_name(node)} shares memory with {owner.name}, which is written in place, but is not "
                "computed from it, so the write cannot be followed: let the operator return a copy"
            )
        views = {source: self.fresh(source) for source in shared if self.is_stale(source)}
        with self.build.graph.inserting_before(self.build.before):
            copy = self.build.graph.node_copy(node, lambda source: views.get(source, source))
        with self.build.on_values():
            copy.meta[self.build.key] = run_on_values(copy)
        self.note(copy, self.owners[node])
        self.again[node] = copy
        return copy

    def replace(self, node: fx.Node, part: fx.Node) -> None:
        """Put a written node in the place of a write into `part`."""
        (owner,) = self.owners[part]
        base = self.current[owner]
        views = self.views(part, base)
        written = Written(tuple(target_of(view) for view in views), target_of(node))
        sources = [base, *views]
        arguments = tuple(
            with_part((view.args, view.kwargs), source) for view, source in zip(views, sources, strict=False)
        )
        args, kwargs = with_part((node.args, node.kwargs), part)
        with self.build.on_values():
            reaches = written.reaches(value(base), map_arg(arguments, value))
        returned = memories(value(node))
        if not reaches or (returned and returned != memories(value(owner))):
            raise GraphError(
                f"{node.name} = {op_name(node)} writes in place into {part.name}, of which it cannot be told where it "
                f"lies in {owner.name}: write into a contiguous tensor, or with the operator that returns a new one"
            )
        self.build.before = node
        result = self.build.call(written, base, arguments, args, kwargs)
        result.meta = {**node.meta, **result.meta}
        self.whole[result], self.current[owner] = owner, result
        self.writes[owner] += 1
        self.note(result, {owner})
        if node.users:
            node.replace_all_uses_with(self.fresh(part) if views else result)
        self.build.graph.erase_node(node)
        for view in reversed(views):
            if not view.users:
                self.build.graph.erase_node(view)

    def views(self, part: fx.Node, base: fx.Node) -> list[fx.Node]:
        """The nodes that lead from `base`, without it, to `part`."""
        found: list[fx.Node] = []
        while part is not base:
            found.insert(0, part)
            sources = [source for source in part.all_input_nodes if self.owners[source] & self.owners[part]]
            if len(sources) != 1:
                raise GraphError(
                    f"{part.name} = {op_name(part)} is written in place and shares memory with {len(sources)} of its "
                    "inputs, so the write cannot be followed: write into a copy of it"
                )
            part = sources[0]
        return found


def target_of(node: fx.Node) -> Target:
    return node.target


def changes_shape(node: fx.Node) -> bool:
    """Whether an operator changes the shape, strides or memory of the tensor itself, as `unsqueeze_` does."""
    if isinstance(node.target, OpOverload):
        return torch.Tag.inplace_view in node.target.tags
    packet = getattr(torch.ops.aten, op_name(node), None)
    return packet is not None and any(
        torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads()
    )
