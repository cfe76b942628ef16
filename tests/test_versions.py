"""Which releases are supported, what is said of others, and what an older one lacks."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

import hawk_compile
from hawk_compile import versions
from hawk_compile.errors import ExportError, UnsupportedModelError, VersionError
from hawk_compile.tools import environment
from tests import zoo

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that stand in for the installed ones."""
    found = {name: versions.installed(name) for name in versions.RANGES}
    monkeypatch.setattr(versions, "installed", lambda package: found[package])
    return found


@pytest.mark.parametrize("package", versions.RANGES)
def test_pyproject_has_the_same_ranges(package: str) -> None:
    first, last = versions.RANGES[package]
    major, minor = versions.release(last)
    assert f"{package}>={first},<{major}.{minor + 1}" in PROJECT["dependencies"]


@pytest.mark.parametrize(("package", "version", "supported"), [
    ("torch", "2.13.0+cpu", True), ("torch", "2.15.1", True), ("torch", "2.16.0", False), ("torch", "2.9.1", False),
    ("torch", "2.14.0a0+git1f", True), ("transformers", "5.19.0", True), ("transformers", "5.23.4", True),
    ("transformers", "5.24.0.dev0", False), ("transformers", "4.57.6", False), ("transformers", "not installed", False),
])  # fmt: skip
def test_what_is_supported(here: dict[str, str], package: str, version: str, supported: bool) -> None:
    here[package] = version
    assert (versions.difference(package) == "") == supported
    if not supported:
        assert f"tested with {package} {' to '.join(versions.RANGES[package])}, and {version} is here" in (
            versions.difference(package)
        )
    assert environment.tested(package).startswith(" (supported" if supported else " (not supported")


def test_optimize_warns_of_a_release_that_nobody_has_tried(here: dict[str, str]) -> None:
    model = zoo.build("llava", layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hawk_compile.optimize(model, ratio=0.5)
    here["torch"] = "2.16.0"
    with pytest.warns(UserWarning, match=r"tested with torch 2.13 to 2.15, and 2.16.0 is here: pip install 'torch>=2"):
        hawk_compile.optimize(model, ratio=0.5)


def test_what_cannot_be_imported_from_such_a_release_is_said_by_name(
    here: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hawk_compile.HOMES, "thing", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hawk_compile\.no_such_module'"):
        hawk_compile.thing  # noqa: B018
    here["transformers"] = "5.10.0"
    with pytest.raises(VersionError, match=r"transformers 5.19 to 5.23, and 5.10.0 is here: .* \(No module named"):
        hawk_compile.thing  # noqa: B018


@pytest.mark.parametrize("version", ["5.19.0", "5.20.2"])
def test_a_model_that_needs_a_later_release_is_refused(here: dict[str, str], version: str) -> None:
    model: Any = zoo.build("smolvlm", layers=1)
    here["transformers"] = version
    with pytest.raises(UnsupportedModelError, match=rf"needs transformers 5.21 or newer, and {version} is here \("):
        hawk_compile.optimize(model, ratio=0.5)
    assert "_hawk_runtime" not in model.__dict__
    here["transformers"] = "5.21.0"
    hawk_compile.optimize(model, ratio=0.5)


def test_an_export_that_needs_a_later_release_is_refused(here: dict[str, str], tmp_path: Path) -> None:
    here["transformers"] = "5.22.2"
    refusal = pytest.raises(ExportError, match=r"export needs transformers 5.23 or newer, and 5.22.2 is here \(.* pip")
    with refusal:
        hawk_compile.export(zoo.build("llava", layers=1), {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
