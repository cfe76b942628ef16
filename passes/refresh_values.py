"""Work out the shapes behind the cut again, and check that they are those of the pruned length.

    before: merged [B, S', D] -> linear [B, S, D] ...     values still say S
    after:  merged [B, S', D] -> linear [B, S', D] ...

Numerics are unchanged. A node that cannot run at the pruned length is named, and so is one that still sees S.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.attention import attends
from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import (
    Builder,
    dependents,
    expr,
    output_node,
    run_on_values,
    same,
    tensor,
    value,
)
from hawk_compile.passes.places import where
from hawk_compile.passes.site import Budgeted, Gathered, Located, Split, read


def refresh_values(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Recompute the fake value of every node behind the boundary.

    Raises:
        ShapeError: a node fails at the pruned length, or a decoder attention has not as many queries for S' as it had
            for S.
    """
    boundary, length = read(gm, Split).boundary, read(gm, Budgeted).kept_length
    located = read(gm, Located)
    attentions = [node for node in dependents(located.entry) if attends(node)]
    queries = {node: value(node).shape[-2] for node in attentions}
    read(gm, Gathered)  # before which every shape still says S
    build = Builder(gm, boundary)
    if build.fake_mode is None:
        return gm
    behind = False
    with build.on_values():
        for node in gm.graph.nodes:
            behind = behind or node is boundary
            if behind and node is not output_node(gm.graph):
                node.meta[build.key] = run(node)
    kept = value(length) if isinstance(length, fx.Node) else length
    for node, full in queries.items():
        pruned, expected = expr(value(node).shape[-2]), at_length(full, located.length, kept)
        if pruned != expected:
            raise ShapeError(
                f"{node.name}{where(node)} still runs over {pruned} positions instead of {expected}: call "
                "hawk_compile.restore(model) to run the model whole"
            )
    return gm


def at_length(size: Any, length: Any, kept: Any) -> Any:
    """What a size becomes at the pruned length: S' in the place of S; some layers run over the last position alone."""
    if same(size, length) or same(size, kept):
        return expr(kept)
    return expr(size) if isinstance(length, int) else expr(size).subs(expr(length), expr(kept))  # type: ignore[union-attr]


def run(node: fx.Node) -> Any:
    try:
        return run_on_values(node)
    except Exception as error:
        shapes = [tuple(found.shape) if (found := tensor(arg)) is not None else arg for arg in node.args]
        raise ShapeError(
            f"{node.name} = {node.target}{where(node)} cannot run at the pruned length (inputs {shapes}): {error}; "
            "call hawk_compile.restore(model) to run the model whole"
        ) from error
