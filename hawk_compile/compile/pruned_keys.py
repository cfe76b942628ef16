"""The keys and values that a graph leaves of a prompt which it alone has pruned: nothing goes on behind them.

A graph knows neither the cache that they are put into nor the next call, which would count its positions by the
keys that are left, not from the prompt's length. `optimize` does that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hawk_compile.errors import UnsupportedCallError
from hawk_compile.passes.attention import OPERATOR, PRODUCTS
from hawk_compile.passes.graph import LAYOUT_OPS, is_call, output_node, tensor

MOVES = LAYOUT_OPS | {"cat", "getitem", "expand", "repeat_interleave", "narrow", "to", "mT", "getattr"}
"""What may stand between a projection's heads, the keys of a cache and an attention that reads them."""


class PrunedKeys(Tensor):
    """Keys or values [B, H, S', d] that cannot be prolonged, which is what a cache does in the next call."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.cat:
            raise UnsupportedCallError(
                'past_key_values holds a prompt that torch.compile(backend="hawk") has pruned, behind which positions '
                "and masks would not be those of the prompt: call hawk_compile.optimize(model, ratio=...), with what "
                "stands in options, on the model as it was, to go on behind a prompt or to generate"
            )
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """As ever: what has one is not traced by Dynamo, which would put it into graphs that refuse nothing."""
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self.clone()
        return copied


def left_in_a_cache(graph: fx.Graph) -> list[int]:
    """Which outputs of a graph are keys or values that its attentions read, by place."""
    heads = [
        each for node in graph.nodes if is_call(node, OPERATOR, *PRODUCTS) for each in node.all_input_nodes
        if (found := tensor(each)) is not None and found.ndim == 4
    ]  # fmt: skip
    read = moved_from(*heads)
    outputs = output_node(graph).args[0]
    assert isinstance(outputs, (tuple, list))
    return [place for place, each in enumerate(outputs) if isinstance(each, fx.Node) and moved_from(each) & read]


def moved_from(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes, and those whose elements they hold in other places."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes if is_call(node, *MOVES) else ())
    return found


def that_ends_here(compiled: Callable[..., Any], places: list[int]) -> Callable[..., Any]:
    """A compiled graph, with outputs at some places that cannot be prolonged."""

    def run(*args: Any) -> Any:
        outputs = list(compiled(*args))
        for place in places:
            outputs[place] = outputs[place].as_subclass(PrunedKeys)
        return tuple(outputs)

    return run
