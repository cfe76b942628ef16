"""Where in a model's code something of a graph comes from, in words."""

from typing import Any

import sympy
from torch import Tensor, fx

from hawk_compile.passes.compat import FakeTensor

FRAME = 'File "'
"""How each frame of a node's stack trace begins."""


def module_path(node: fx.Node) -> str:
    """Where in the model the node was traced, without the path to the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("", None))[0] if stack else ""
    return path.split("__self__", 1)[-1].lstrip(".").replace("['", ".").replace("']", "")


def line_of(node: fx.Node) -> str:
    """The innermost line of Python that made the node, as `FILE:LINE, in FUNCTION: CODE`; empty where none is known."""
    place, _, code = (node.meta.get("stack_trace") or "").rpartition(FRAME)[2].strip().partition("\n")
    file, _, rest = place.partition('", line ')
    number, _, function = rest.partition(", in ")
    return f"{file}:{number}, in {function}: `{code.strip()}`" if number else ""


def where(node: fx.Node) -> str:
    """The module and the line of a node, in parentheses behind a blank; empty where nothing is known."""
    path, line = module_path(node), line_of(node)
    known = [text for text in (path and f"model.{path}", line) if text]
    return f" ({', '.join(known)})" if known else ""


def in_words(place: Any) -> str:
    """The line that asked for a condition on sizes, behind ` at `; empty where none is known."""
    return f" at {said}" if (said := getattr(place, "maybe_user_loc", None)) else ""


def where_fixed(found: Tensor | None, size: int) -> str:
    """The line that made this number of a symbolic size of a fake value, behind ` at `; empty where none is known."""
    env = found.fake_mode.shape_env if isinstance(found, FakeTensor) else None
    for guard in () if env is None else env.guards:
        if guard.expr.func is sympy.Eq and size in guard.expr.args and len(guard.expr.free_symbols) == 1:
            return in_words(guard.sloc)
    return ""
