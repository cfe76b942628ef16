"""Remove the checks that torch.export writes into a graph: they pin values at the prompt's full length.

    before: x | _assert_tensor_metadata(x, ...), _guards_fn(x, ...), _assert_scalar(features == placeholders)
    after:  x

Numerics are unchanged. What they check is checked on the host before the graph runs.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.compat import ASSERTIONS, GUARDS
from hawk_compile.passes.graph import op_name

CHECKS = ASSERTIONS


def remove_assertions(
    gm: fx.GraphModule, example_inputs: list[Any], *, checks: tuple[str, ...] = CHECKS
) -> fx.GraphModule:
    """Erase every check of tensors or sizes that is not part of a computation, and what only it needed.

    Args:
        checks: the operators that check, by name.
    """
    found = [node for node in gm.graph.nodes if is_check(node, checks)]
    for node in reversed(found):
        gm.graph.erase_node(node)
    if found:
        gm.graph.eliminate_dead_code()  # which keeps what writes in place
    return gm


def is_check(node: fx.Node, checks: tuple[str, ...]) -> bool:
    if node.op == "call_module":
        return node.target == GUARDS
    return node.op == "call_function" and op_name(node) in checks and not node.users
