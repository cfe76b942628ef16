"""The attentions of a graph, written as one operator or as its steps.

    scaled_dot_product_attention(query, key, value)

    matmul(softmax(... matmul(query, transpose(key)) ...), value)        the steps, as eager attention takes them

What stands for the steps is the softmax. Between it and the product of queries and keys may be whatever works on single
elements (a scale, a cap, a mask, a bias of positions), and sinks appended to the keys.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.compat import ATEN_SOFTMAX, TO_COPY
from hawk_compile.passes.entry import works_on_elements
from hawk_compile.passes.graph import argument, expr, is_call, op_name, same, tensor

OPERATOR = "scaled_dot_product_attention"
SOFTMAX = ("softmax", ATEN_SOFTMAX)
PRODUCTS = ("matmul", "bmm")
TRANSPOSITIONS = ("transpose", "swapaxes", "swapdims", "permute", "movedim", "mT", "getattr")
"""The last one reads `mT` too: Dynamo writes it so up to torch 2.13."""
BETWEEN = ("to", "float", "half", "bfloat16", "type_as", "clone", "contiguous", "cat", "dropout", "truediv", TO_COPY)
"""What may stand between the product and the softmax, beside operators of single elements."""


def attends(node: fx.Node) -> bool:
    """Whether a node is an attention of heads, of whatever values."""
    found = tensor(node)
    return is_call(node, OPERATOR) or (is_call(node, *SOFTMAX) and found is not None and found.ndim == 4)


def query_and_key(node: fx.Node, length: Any) -> tuple[fx.Node, fx.Node] | None:
    """What an attention over the prompt's tokens compares: queries and keys [B, H, S, d]; keys behind a cache have more
    positions, and those of the steps may be laid out [B, S, H, d]. None if the node is no such attention."""
    if is_call(node, OPERATOR):
        pair = argument(node, 0, "query"), argument(node, 1, "key")
    elif is_call(node, *SOFTMAX):
        pair = compared(node, length)
    else:
        return None
    query, key = pair
    shapes = [found.shape for each in pair if (found := tensor(each)) is not None]
    if query is None or key is None or len(shapes) != 2 or len(shapes[0]) < 3:
        return None
    over_prompt = same(shapes[0][-2], length) and any(holds(size, length) for size in shapes[1][1:-1])
    return (query, key) if over_prompt else None


def compared(softmax: fx.Node, length: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The queries and the keys of the one product [B, H, S, P + S] that a softmax is taken of."""
    products: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [argument(softmax, 0, "input")]
    while stack:
        node = stack.pop()
        found = tensor(node)
        if node is None or node in seen or found is None or not (found.is_floating_point() and found.ndim == 4):
            continue
        seen.add(node)
        if is_call(node, *PRODUCTS):
            if same(found.shape[-2], length) and holds(found.shape[-1], length):
                products.append(node)
        elif is_call(node, *BETWEEN) or works_on_elements(op_name(node)):
            stack.extend(node.all_input_nodes)
    if len(products) != 1:
        return None, None
    turned = argument(products[0], 1, "other")
    keys = turned.args[0] if turned is not None and is_call(turned, *TRANSPOSITIONS) else None
    return argument(products[0], 0, "input"), keys if isinstance(keys, fx.Node) else None


def holds(size: Any, length: Any) -> bool:
    """Whether a size is S, or S behind the slots of a cache."""
    symbols: set[Any] = getattr(expr(length), "free_symbols", set())
    if not symbols:
        return isinstance(size, int) and size >= length
    return same(size, length) or bool(symbols & getattr(expr(size), "free_symbols", set()))
