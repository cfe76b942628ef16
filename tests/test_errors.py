"""One tree of errors: `except hawk_compile.HawkError` catches all that this package raises on purpose."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest
import torch

import hawk_compile
from hawk_compile import errors
from hawk_compile.compile.backend import hawk
from tests.passes import graphs

ROOT = Path(__file__).parents[1]
BUILT_IN = {name for name, found in vars(builtins).items() if isinstance(found, type) and issubclass(found, Exception)}
NOT_OURS = {"AssertionError", "AttributeError"}
"""What says that the code itself is wrong, and how Python wants to be told that a module has no such name."""


def test_every_error_is_of_the_tree_and_at_hand():
    kinds = {name: found for name, found in vars(errors).items() if isinstance(found, type)}
    assert set(errors.__all__) == kinds.keys()
    assert all(issubclass(found, errors.HawkError) for found in kinds.values())
    assert hawk_compile.HawkError is errors.HawkError
    assert {name for name in hawk_compile.__all__ if name.endswith("Error")} <= kinds.keys()


def test_nothing_else_is_raised():
    raised = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for room in ("hawk_compile", "passes", "kernels")
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        if (name := ast.unparse(getattr(node.exc, "func", node.exc) or node)) in BUILT_IN - NOT_OURS
    ]
    assert raised == []


def test_a_pass_an_operator_and_a_setting_raise_it():
    gm = graphs.captured(graphs.Decoder(), *graphs.prompt(length=graphs.WIDTH), dynamic=False)
    with pytest.raises(hawk_compile.HawkError, match="dynamic=True"):
        hawk(gm, [], options={"ratio": 0.5, "backend": "eager"})
    with pytest.raises(hawk_compile.HawkError, match="keep must be"):
        torch.ops.hawk.gather(torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(hawk_compile.HawkError, match="ratio"):
        hawk(gm, [], options={"ratio": 2})
