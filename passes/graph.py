"""What every pass asks of an FX graph, the same for Dynamo's torch IR and torch.export's ATen IR.

A node's value (a fake tensor or a symbolic integer) stands in `meta["example_value"]` or in `meta["val"]`; an operator
is a method name, a function or an overload. The helpers here hide both differences.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg

from hawk_compile.passes.compat import (
    UNSAFE_VIEW,
    FakeTensor,
    OpOverload,
    OpOverloadPacket,
    enable_python_dispatcher,
    storage_of,
)
from hawk_compile.passes.compat import schema_of as operator_schema
from hawk_compile.passes.errors import GraphError, ShapeError

Size = fx.Node | int
"""A size in a graph: a node where it is symbolic, a number where it is fixed."""
EMPTY: Mapping[Any, Any] = MappingProxyType({})
VALUE_KEYS = ("example_value", "val")
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""The types of tensors that are numbers in memory and nothing else. Others say themselves what operators do with them:
weights that are quantised, or shared between devices."""
LAYOUT_OPS = frozenset(
    {"view", "reshape", UNSAFE_VIEW, "unflatten", "transpose", "permute", "movedim", "contiguous", "clone", "alias"}
)
"""Operators that move elements without changing them."""
OPERATOR_WRITES = frozenset(
    {
        "setitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
        "ilshift", "irshift",
    }
)  # fmt: skip
"""Functions of `operator` that write into their first argument; those that end in an underscore, as `and_`, do not."""
WRITE_NO_ELEMENT = frozenset({"requires_grad_", "share_memory_", "detach_"})


def value(node: fx.Node) -> Any:
    """The node's fake value, or None where the graph carries none."""
    for key in VALUE_KEYS:
        if key in node.meta:
            return node.meta[key]
    return None


def tensor(node: Any) -> Tensor | None:
    """The node's fake tensor, or None if it is no node or no tensor."""
    found = value(node) if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def is_plain(found: Any) -> bool:
    """Whether a value is a tensor of one of the types `PLAIN`, on which every operator runs."""
    return type(found) in PLAIN


def shape_of(node: Any) -> tuple[Any, ...]:
    """The shape of a node's tensor, of numbers and SymInts."""
    found = tensor(node)
    if found is None:
        raise ShapeError(
            f"{node} has no tensor value in this graph, so nothing can be told from its shape: call "
            "hawk_compile.restore(model) to run the model whole"
        )
    return tuple(found.shape)


def op_name(node: fx.Node) -> str:
    """The operator's plain name: `masked_scatter` for the method, the function and every ATen overload alike."""
    return name_of(node.target)


def name_of(target: Any) -> str:
    """The plain name of what a node calls."""
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    if isinstance(target, OpOverloadPacket):
        return target.__name__
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_call(node: fx.Node, *names: str) -> bool:
    """Whether the node calls an operator of one of these names."""
    return node.op in ("call_function", "call_method") and op_name(node) in names


def argument(node: fx.Node, index: int, name: str) -> Any:
    """What a call is given, by place or by name; None if nothing."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def expr(size: Any) -> sympy.Expr | None:
    """A size as a sympy expression, with what the shape environment has since learned put in; None if it is no size."""
    if isinstance(size, SymInt):
        return size.node.expr
    if isinstance(size, int) and not isinstance(size, bool):
        return sympy.Integer(size)
    return None


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are the same expression. Never guards: two symbols with equal values are still different."""
    left_expr, right_expr = expr(left), expr(right)
    return left_expr is not None and right_expr is not None and left_expr == right_expr


def sizes_equal_to(shape: Iterable[Any], size: Any) -> list[int]:
    """The dimensions of `shape` whose size is `size`."""
    return [dim for dim, found in enumerate(shape) if same(found, size)]


def memories(found: Any) -> set[int]:
    """Which storages a value lies in: a tensor, or a tuple or list of them. Views share their tensor's."""
    if isinstance(found, Tensor):
        return {storage_of(found)}
    if isinstance(found, (tuple, list)):
        return set().union(*map(memories, found))
    return set()


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors among a node's arguments that it writes into."""
    if node.op not in ("call_function", "call_method"):
        return []
    schema = schema_of(node)
    name = op_name(node)
    if schema is not None:
        named = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
        writes = [argument.name for argument in schema.arguments if argument.is_write]
        written = [named[name] for name in writes if name in named]
    else:
        of_operator = getattr(node.target, "__module__", None) == operator.add.__module__
        in_place = name.endswith("_") and not name.endswith("__") and not of_operator
        first = in_place or name.strip("_") in OPERATOR_WRITES or bool(node.kwargs.get("inplace"))
        written = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
        written += [node.args[0] if node.args else node.kwargs.get("input")] if first else []
    if name in WRITE_NO_ELEMENT:
        return []
    leaves = [leaf for each in written for leaf in (each if isinstance(each, (tuple, list)) else (each,))]
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node) and memories(value(leaf))]


def schema_of(node: fx.Node) -> Any:
    """The schema of an ATen or custom operator; None of what is called by a torch function or method."""
    if isinstance(node.target, OpOverload):
        return operator_schema(node.target)
    if isinstance(node.target, OpOverloadPacket) and len(node.target.overloads()) == 1:
        return operator_schema(getattr(node.target, node.target.overloads()[0]))
    return None


def run_on_values(node: fx.Node) -> Any:
    """The node's value, worked out from its inputs' values."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def ancestors(*nodes: fx.Node, replaced: Mapping[fx.Node, fx.Node] = EMPTY) -> set[fx.Node]:
    """The nodes and all that they are computed from, where some are replaced by others."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in replaced:
            stack.append(replaced[node])
        elif node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def dependents(node: fx.Node) -> set[fx.Node]:
    """All that is computed from the node, without the node itself and without the graph's output."""
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user not in found and user.op != "output":
            found.add(user)
            stack.extend(user.users)
    return found


def output_node(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def in_order(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes in the graph's order."""
    wanted = set(nodes)
    return [node for node in graph.nodes if node in wanted]


class Builder:
    """Writes nodes in front of one node, each with its fake value, as the rest of the graph has them."""

    def __init__(self, gm: fx.GraphModule, before: fx.Node):
        self.graph = gm.graph
        self.before = before
        # The mode of the graph's own values: inside a backend, Dynamo's current mode is already another one.
        values = (value(node) for node in gm.graph.nodes)
        self.fake_mode = next((found.fake_mode for found in values if isinstance(found, FakeTensor)), None)
        self.key = "val" if any("val" in node.meta for node in gm.graph.nodes) else "example_value"

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert `target(*args, **kwargs)`; nodes among the arguments stand for their values."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        with self.on_values():
            node.meta[self.key] = run_on_values(node)
        return node

    @contextmanager
    def on_values(self) -> Iterator[None]:
        """A context in which operators run on the graph's fake values."""
        with self.fake_mode or nullcontext(), self.fresh(), enable_python_dispatcher(), torch.no_grad():
            yield

    def fresh(self) -> Any:
        """A context in which sizes read from values are new symbols, which the compiler behind makes again."""
        shape_env = self.fake_mode.shape_env if self.fake_mode is not None else None
        return nullcontext() if shape_env is None else shape_env.ignore_fresh_unbacked_symbols()

    def size(self, operation: Callable[..., Any], left: Size, right: Size) -> Size:
        """`operation(left, right)` on sizes: a node where the result is symbolic, a number where it is not."""
        result = operation(*(value(side) if isinstance(side, fx.Node) else side for side in (left, right)))
        return self.call(operation, left, right) if isinstance(result, SymInt) else int(result)

    def size_of(self, node: fx.Node, dim: int) -> Size:
        """The size of one dimension of a node's tensor, as a node where it is symbolic."""
        found = value(node).shape[dim]
        return self.call(torch.ops.aten.sym_size.int, node, dim) if isinstance(found, SymInt) else int(found)

    def item(self, node: fx.Node, index: Any) -> fx.Node:
        """Insert `node[index]`."""
        return self.call(operator.getitem, node, index)

    def clone(self, nodes: Iterable[fx.Node], replaced: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copy nodes (in graph order) with some of their inputs replaced; returns old -> new, `replaced` included.

        What is replaced by a node that is copied is replaced by the copy.

        Raises:
            GraphError: a node writes in place, which a copy of it would do again.
        """
        copies: dict[fx.Node, fx.Node] = {}

        def copied(old: fx.Node) -> fx.Node:
            new = replaced.get(old, old)
            return copies.get(new, new)

        for node in in_order(self.graph, nodes):
            if written := written_by(node):
                raise GraphError(
                    f"{node.name} = {op_name(node)} writes in place into {written[0].name}, which the graph is given, "
                    "and is needed to score the visual tokens, so it would be written twice: let the model write into "
                    "a copy"
                )
            with self.graph.inserting_before(self.before):
                copies[node] = self.graph.node_copy(node, copied)
        return copies | {old: copied(old) for old in replaced}
