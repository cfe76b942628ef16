"""What importing costs: nothing is loaded, and nothing printed, before it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hawk_compile

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch", "transformers", "triton", "torchao", "numpy", "PIL", "onnx", "onnxruntime", "openvino", "tensorrt_rtx",
    "executorch", "matplotlib", "accelerate", "sklearn",
)  # fmt: skip
COMMAND_LINE = ("typer", "rich", "hawk_compile.tools", "hawk_compile.runtime", "hawk_compile.exporting")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that makes errors of warnings."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, env=environment, check=False
    )


def loaded_by(statement: str, unwanted: tuple[str, ...]) -> list[str]:
    """Those of the unwanted modules that a statement loads in a new process; it must print nothing by itself."""
    result = run("-c", f"{statement}\nimport sys\nprint(*[name for name in {unwanted!r} if name in sys.modules])")
    assert result.returncode == 0 and not result.stderr, result.stderr
    (line,) = result.stdout.splitlines()
    return line.split()


def test_importing_the_package_loads_no_library_and_prints_nothing() -> None:
    assert loaded_by("import hawk_compile", (*HEAVY, *COMMAND_LINE)) == []
    result = run("-c", "import hawk_compile")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_settings_need_no_transformers_and_no_command_line() -> None:
    assert loaded_by("from hawk_compile import HawkConfig", ("transformers", "torchao", *COMMAND_LINE)) == []


def test_help_of_the_command_line_loads_no_library() -> None:
    result = run("-m", "hawk_compile", "--help")
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert all(command in result.stdout for command in ("calibrate", "evaluate", "export"))
    assert loaded_by("import hawk_compile.tools.cli", HEAVY) == []


def test_the_backend_is_listed_without_being_loaded() -> None:
    statement = "import torch._dynamo\nassert 'hawk' in torch._dynamo.list_backends()"
    assert loaded_by(statement, ("hawk_compile", "transformers")) == []


def test_every_public_name_is_there_and_shadows_no_module() -> None:
    for name in hawk_compile.__all__:  # as `from hawk_compile import *` does
        value = getattr(hawk_compile, name)
        assert isinstance(value, ModuleType) == (ROOT / "hawk_compile" / f"{name}.py").is_file(), name
    assert {*hawk_compile.__all__} <= {*dir(hawk_compile)}
    assert {*hawk_compile.__all__} == {*hawk_compile.HOMES, *hawk_compile.SUBMODULES}
    assert not hasattr(hawk_compile, "no_such_name")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(hawk_compile.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and not isinstance(node.test, ast.UnaryOp))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    assert {*seen} == {*hawk_compile.__all__}
    for name, place in seen.items():
        module, _, inner_name = place.rpartition(".")
        assert getattr(hawk_compile, name) is getattr(sys.modules[module], inner_name), name
