"""What holds for the source files and no linter checks; `make check` holds the rooms' imports (pyproject.toml)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parents[1]
ROOMS = ("hawk_compile", "passes", "kernels")
MOST_LINES = 375
MOST_OF_A_FUNCTION = 60
"""Lines without the docstring."""
MOST_OF_A_KERNEL = 105
"""A Triton kernel is one function: what it calls is compiled into it, with no names of tensors to pass."""
FAMILIES = {
    "qwen", "llava", "internvl", "smolvlm", "idefics", "gemma", "paligemma", "mistral", "pixtral", "glm", "llama",
    "deepseek", "kimi",
}  # fmt: skip


def sources(*rooms: str) -> dict[str, str]:
    """The source files of the rooms by path; the links inside hawk_compile to the other two are not followed."""
    links = (ROOT / "hawk_compile/passes", ROOT / "hawk_compile/kernels")
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    own = [path for path in paths if not any(path.is_relative_to(link) for link in links)]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in own}


def test_no_model_is_named_in_passes_and_kernels() -> None:
    """No model type of transformers appears as a word, in names, comments or messages: plain English words are none."""
    types = {name for name in CONFIG_MAPPING if any(letter.isdigit() or letter == "_" for letter in name)} | FAMILIES
    named = {path: words & types for path, text in sources("passes", "kernels").items() if (words := words_of(text))}
    assert {path: names for path, names in named.items() if names} == {}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower().replace("-", "_")))


def test_kernels_know_no_fx() -> None:
    assert [path for path, text in sources("kernels").items() if re.search(r"\btorch\.fx\b|import fx\b", text)] == []


def test_no_remote_code_is_trusted() -> None:
    """It may be refused by name: where nothing is said, transformers asks whoever sits at the terminal."""
    trusting = [
        f"{path}:{node.value.lineno}"
        for path, text in sources(*ROOMS, "examples", "benchmarks").items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert trusting == []


def test_a_file_fits_on_a_few_screens() -> None:
    lines = {path: len(text.splitlines()) for path, text in sources(*ROOMS).items()}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_a_function_fits_on_a_screen() -> None:
    long = {
        f"{path}:{node.lineno} {node.name}": count
        for path, text in sources(*ROOMS).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        if (count := lines_of_code(node)) > (MOST_OF_A_KERNEL if is_kernel(node) else MOST_OF_A_FUNCTION)
    }
    assert long == {}


def lines_of_code(function: ast.FunctionDef) -> int:
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    said = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
    return (function.end_lineno or 0) - function.lineno + 1 - said


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "import torch; torch.save(1, 'x')",
        "eval('1')",
        "exec('1')",
        "from . import x",
    ],
)
def test_the_linter_refuses_what_runs_code_from_data(line: str) -> None:
    check = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "hawk_compile/tools/x.py", "--no-cache", "-"]
    checked = subprocess.run(check, input=line, text=True, capture_output=True, cwd=ROOT, check=False)
    assert any(rule in checked.stdout for rule in ("TID251", "TID252", "S102", "S307")), checked.stdout
