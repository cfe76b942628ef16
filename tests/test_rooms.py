"""The rooms and their doors: hawk_compile imports passes imports kernels, and never the other way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parents[1]
PACKAGE = "hawk_compile"
SHARED_BY_PASSES = {"graph", "site", "errors", "written"}
"""Modules in passes/ that are no pass."""
FORBIDDEN_CALLS = {"exec", "eval", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save")}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
MOST_LINES = 450


def sources(*rooms: str) -> list[Path]:
    """The source files of the rooms; the links inside hawk_compile to the other two are not followed."""
    inside = (ROOT / PACKAGE / "passes", ROOT / PACKAGE / "kernels")
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if not any(path.is_relative_to(link) for link in inside)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] in (PACKAGE, "examples", "benchmarks") else (PACKAGE, *parts))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


LIBRARY = sources(PACKAGE, "passes", "kernels")


@pytest.mark.parametrize("path", sources("passes"), ids=ids)
def test_a_pass_imports_kernels_and_what_passes_share(path: Path) -> None:
    for name in imports(path):
        if name.startswith(f"{PACKAGE}.passes."):
            assert name.split(".")[2] in SHARED_BY_PASSES, f"{path.name} imports another pass: {name}"
        else:
            assert not name.startswith(PACKAGE) or name.startswith(f"{PACKAGE}.kernels"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources("kernels"), ids=ids)
def test_a_kernel_imports_torch_alone(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith(PACKAGE) or name.startswith(f"{PACKAGE}.kernels"), f"{path.name} imports {name}"
        assert not name.startswith("torch.fx"), f"{path.name} imports {name}"
        assert name.split(".")[0] != "triton" or path.name.startswith("triton_"), f"{path.name} imports triton"


@pytest.mark.parametrize("path", sources("examples"), ids=ids)
def test_an_example_uses_the_public_api(path: Path) -> None:
    public = (f"{PACKAGE}.tools.demo", f"{PACKAGE}.errors")
    for name in imports(path):
        inner = name.startswith(f"{PACKAGE}.") and not name.startswith(public)
        assert not inner, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources("passes", "kernels"), ids=ids)
def test_no_model_is_named(path: Path) -> None:
    """No model type of transformers appears as a word, in names, comments or messages."""
    text = path.read_text(encoding="utf-8").lower().replace("-", "_")
    words = {"".join(letter if letter.isalnum() or letter == "_" else " " for letter in text)}
    found = {part for word in words for part in word.split()} & model_names()
    assert not found, f"{path.name} names {sorted(found)}"


def model_names() -> set[str]:
    """Model types that hold a digit or an underscore, or are known families: plain English words are no names."""
    families = {
        "qwen",
        "llava",
        "internvl",
        "smolvlm",
        "idefics",
        "gemma",
        "paligemma",
        "mistral",
        "pixtral",
        "glm",
        "llama",
    }
    return families | {name for name in CONFIG_MAPPING if any(letter.isdigit() or letter == "_" for letter in name)}


@pytest.mark.parametrize("path", [*LIBRARY, *sources("examples", "benchmarks")], ids=ids)
def test_nothing_runs_code_from_data(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{path} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_CALLS, f"{path}:{node.lineno} uses {node.id}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES, f"{path}:{node.lineno} uses {node.attr}"
        elif isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", f"{path}:{node.value.lineno} trusts remote code"


@pytest.mark.parametrize("path", LIBRARY, ids=ids)
def test_a_file_fits_on_a_few_screens(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path.name} has {lines} lines"
