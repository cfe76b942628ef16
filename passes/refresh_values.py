"""Work out the shapes behind the cut again, and check that they are those of the pruned length.

    before: merged [B, S', D] -> linear [B, S, D] ...     values still say S
    after:  merged [B, S', D] -> linear [B, S', D] ...

Numerics are unchanged. A node that cannot run at the pruned length is named, and so is one that still sees S.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import (
    Builder,
    dependents,
    expr,
    is_call,
    output_node,
    run_on_values,
    same,
    tensor,
    value,
)
from hawk_compile.passes.site import Budgeted, Gathered, Located, Split, read


def refresh_values(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Recompute the fake value of every node behind the boundary.

    Raises:
        ShapeError: a node fails at the pruned length, or a decoder attention still has S queries.
    """
    boundary, length = read(gm, Split).boundary, read(gm, Budgeted).kept_length
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
    for node in dependents(read(gm, Located).entry):
        if is_call(node, "scaled_dot_product_attention") and not same(value(node).shape[-2], kept):
            length = value(node).shape[-2]
            raise ShapeError(f"{node.name} still runs over {expr(length)} positions instead of {expr(kept)}")
    return gm


def run(node: fx.Node) -> Any:
    try:
        return run_on_values(node)
    except Exception as error:
        shapes = [tuple(found.shape) if (found := tensor(arg)) is not None else arg for arg in node.args]
        raise ShapeError(
            f"{node.name} = {node.target} cannot run at the pruned length (inputs {shapes}): {error}"
        ) from error
