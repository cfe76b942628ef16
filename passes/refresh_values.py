"""Work out the shapes behind the cut again, and check that they are those of the pruned length.

    before: merged [B, S', D] -> linear [B, S, D] ...     values still say S
    after:  merged [B, S', D] -> linear [B, S', D] ...

Numerics are unchanged. A node that cannot run at the pruned length is named, and so is one that still sees S.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import Builder, dependents, expr, is_call, output_node, same, value
from hawk_compile.passes.site import site_of


def refresh_values(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Recompute the fake value of every node behind the boundary.

    Raises:
        ShapeError: a node fails at the pruned length, or a decoder attention still has S queries.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    build = Builder(gm, site.boundary)
    if build.fake_mode is None:
        return gm
    behind = False
    with build.fake_mode, enable_python_dispatcher(), torch.no_grad(), build.fresh():
        for node in gm.graph.nodes:
            behind = behind or node is site.boundary
            if behind and node is not output_node(gm.graph):
                node.meta[build.key] = run(node)
    kept = value(site.kept_length) if isinstance(site.kept_length, fx.Node) else site.kept_length
    for node in dependents(site.merged):
        if is_call(node, "scaled_dot_product_attention") and not same(value(node).shape[-2], kept):
            length = value(node).shape[-2]
            raise ShapeError(f"{node.name} still runs over {expr(length)} positions instead of {expr(kept)}")
    return gm


def run(node: fx.Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), value)
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        shapes = [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args]
        raise ShapeError(
            f"{node.name} = {node.target} cannot run at the pruned length (inputs {shapes}): {error}"
        ) from error
