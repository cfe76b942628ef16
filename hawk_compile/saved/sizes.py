"""What a graph asks of sizes, in JSON, and whether it is so of numbers.

    Ne(s72 - 2, 0)    ["Unequality", ["Add", -2, "s72"], 0]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from hawk_compile.exporting.schema import Misfit
from hawk_compile.saved.calls import NotSaved

MANY = -1
"""In the place of a size that a graph does not read: two or more, since Dynamo keeps 0 and 1 apart."""

Written = int | bool | str | list[Any]

MOST = 20
"""How deep what is read may be nested."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": lambda *values: sum(values),
    "Mul": lambda *values: math.prod(values),
    "Equality": lambda left, right: left == right,
    "Unequality": lambda left, right: left != right,
    "StrictLessThan": lambda left, right: left < right,
    "LessThan": lambda left, right: left <= right,
    "StrictGreaterThan": lambda left, right: left > right,
    "GreaterThan": lambda left, right: left >= right,
    "And": lambda *values: all(values),
    "Or": lambda *values: any(values),
    "Not": lambda value: not value,
    "Max": max,
    "Min": min,
    "FloorDiv": lambda left, right: left // right,
    "Mod": lambda left, right: left % right,
    "PythonMod": lambda left, right: left % right,
}
"""What stands in expressions of sizes, by the names of sympy's and torch's classes."""


def written(expression: Any) -> Written:
    """An expression of sympy's.

    Raises:
        NotSaved: of a function that is not known here.
    """
    if isinstance(expression, (bool, int)):
        return expression
    if getattr(expression, "is_Symbol", False):
        return str(expression)
    if getattr(expression, "is_Integer", False):
        return int(expression)
    name = type(expression).__name__
    if name in ("BooleanTrue", "BooleanFalse"):
        return name == "BooleanTrue"
    if name not in FUNCTIONS:
        raise NotSaved(f"its graph asks {expression} of sizes, of which {name} is not known here")
    return [name, *map(written, expression.args)]


def symbols_in(expression: Written) -> set[str]:
    if isinstance(expression, list):
        return set().union(*map(symbols_in, expression[1:]))
    return {expression} if isinstance(expression, str) else set()


def check(expression: Any, known: set[str], depth: int = 0) -> None:
    """Refuse what is no expression of these symbols.

    Raises:
        Misfit: as said.
    """
    if type(expression) in (int, bool) or (type(expression) is str and expression in known):
        return
    if depth > MOST or not isinstance(expression, list) or not expression or expression[0] not in FUNCTIONS:
        raise Misfit(f"{str(expression)[:80]} is no expression of sizes")
    for part in expression[1:]:
        check(part, known, depth + 1)


def value_of(expression: Written, sizes: Mapping[str, int]) -> Any:
    """What an expression is where its symbols are these numbers."""
    if isinstance(expression, list):
        return FUNCTIONS[expression[0]](*(value_of(part, sizes) for part in expression[1:]))
    return sizes[expression] if isinstance(expression, str) else expression


class Sized(Protocol):
    """What a graph asks of sizes; see `hawk_compile.saved.graph.Graph`."""

    @property
    def shapes(self) -> list[list[Written]]: ...
    @property
    def symbols(self) -> dict[str, tuple[int, int]]: ...
    @property
    def ranges(self) -> dict[str, tuple[int | None, int | None]]: ...
    @property
    def conditions(self) -> list[Written]: ...


def serves(graph: Sized, tensors: Sequence[Tensor]) -> bool:
    """Whether the sizes of a call's tensors, which is made of the same as the one captured, are among the graph's."""
    sizes = {name: tensors[place].shape[dim] for name, (place, dim) in graph.symbols.items()}
    for name, (least, most) in graph.ranges.items():
        if (least is not None and sizes[name] < least) or (most is not None and sizes[name] > most):
            return False
    for tensor, expected in zip(tensors, graph.shapes, strict=True):
        for size, wanted in zip(tensor.shape, expected, strict=True):
            if size < 2 if wanted == MANY else size != value_of(wanted, sizes):
                return False
    return all(value_of(condition, sizes) for condition in graph.conditions)
