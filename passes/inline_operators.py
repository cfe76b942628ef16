"""Replace the hawk operators by plain PyTorch, for targets that know no operator of ours.

    before: scores = hawk.score_folded(...); keep, valid = hawk.select(scores, ...); x = hawk.gather(x, keep)
    after:  the calls of kernels/*/reference.py, which the next export traces into ATen operators

Attention is called by its public name again, under which exporters replace it by what a target computes alike where a
row of the mask is closed. Numerics are those of the definitions. `selection="threshold"` takes the form
without a sort, for targets whose TopK is limited (TensorRT: 3,840 elements).
"""

from typing import Any

import torch
from torch import fx

import hawk_compile.kernels.gather.op
import hawk_compile.kernels.score.op
import hawk_compile.kernels.select.op  # noqa: F401  the three register the operators
from hawk_compile.kernels.gather import reference as gather
from hawk_compile.kernels.score import by_token
from hawk_compile.kernels.score import reference as score
from hawk_compile.kernels.select import reference as select

SELECTIONS = {"sort": select.select, "threshold": select.select_by_threshold}


def attention(*args: Any, **kwargs: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def inline_operators(gm: fx.GraphModule, example_inputs: list[Any], *, selection: str = "sort") -> fx.GraphModule:
    """Let every hawk operator be computed by its definition.

    Args:
        selection: 'sort' or 'threshold'.
    """
    operators = torch.ops.hawk
    plain = {
        operators.score_folded.default: score.score_folded,
        operators.score_projected.default: score.score_projected,
        operators.score_each.default: by_token.score_each,
        operators.select.default: SELECTIONS[selection],
        operators.gather.default: gather.gather,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
    }
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in plain:
            node.target = plain[node.target]
    return gm
