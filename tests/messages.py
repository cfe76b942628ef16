"""The texts that the package's source holds, as templates: what stands in for a value is `...`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("hawk_compile", "passes", "kernels")
VALUE = "..."


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package and its tree, once: two folders in `hawk_compile/` are links to the other rooms."""
    seen = set()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path.resolve().relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def template(node: ast.AST, names: dict[str, str] | None = None) -> str:
    """What an expression of text says, whatever its values are.

    Args:
        names: texts by the names that stand for them; see `named`.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, names) + template(node.right, names)
    if isinstance(node, ast.IfExp):
        return f"{template(node.body, names)} / {template(node.orelse, names)}"
    if isinstance(node, ast.Name) and names:
        return names.get(node.id, VALUE)
    return VALUE


def named(tree: ast.AST, names: dict[str, str] | None = None) -> dict[str, str]:
    """Texts that a module, or the package's other modules, give a name to; of several of one name, all."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if (text := template(node.value, names)).replace(VALUE, ""):
            name = node.targets[0].id
            found[name] = f"{found[name]} / {text}" if name in found else text
    return found


@cache
def constants() -> dict[str, str]:
    """Texts by the names, in capitals, that some module gives them."""
    return {name: text for _, tree in sources() for name, text in named(tree).items() if name.isupper()}


@cache
def texts() -> frozenset[str]:
    """All texts but docstrings."""
    found = set()
    for _, tree in sources():
        docstrings = {
            id(first.value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            for first in node.body[:1]
            if isinstance(first, ast.Expr)
        }
        found |= {
            plain(template(node))
            for node in ast.walk(tree)
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in docstrings
        }
    return frozenset(found)


def plain(text: str) -> str:
    """Without line ends, and without code marks, which a page cannot hold within one."""
    return re.sub(r"\s+", " ", text.replace("`", ""))


def is_message_start(start: str) -> bool:
    return any(text.startswith(plain(start)) for text in texts())
