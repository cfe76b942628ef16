"""What is installed is what the repository holds."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import hawk_compile

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folder_of(package: str) -> Path:
    """Where setuptools takes a package from: the longest prefix that package-dir maps, else the path of its name."""
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    for prefix in sorted(mapped, key=len, reverse=True):
        if package == prefix or package.startswith(prefix + "."):
            return ROOT / mapped[prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")
    return ROOT / package.replace(".", "/")


def test_every_folder_with_sources_is_a_package() -> None:
    sources = [path for room in ("hawk_compile", "passes", "kernels") for path in (ROOT / room).rglob("*.py")]
    folders = {path.parent for path in sources if not path.is_relative_to(ROOT / "hawk_compile/passes")}
    folders = {folder for folder in folders if not folder.is_relative_to(ROOT / "hawk_compile/kernels")}
    listed = {folder_of(package) for package in PROJECT["tool"]["setuptools"]["packages"]}
    # Namespace packages hold no source of their own.
    assert folders <= listed, f"not in pyproject's packages: {sorted(map(str, folders - listed))}"
    assert all(folder.is_dir() for folder in listed)
    assert listed - folders <= {ROOT / "kernels"}


def test_links_lead_to_the_rooms() -> None:
    for room in ("passes", "kernels"):
        assert (ROOT / "hawk_compile" / room).resolve() == ROOT / room
        assert not (ROOT / room / "__init__.py").exists()  # STYLE: transformers would take it for another package


def test_every_data_file_is_listed() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = folder_of(package)
        wanted = {found for pattern in data.get(package, []) for found in folder.glob(pattern)}
        present = {path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert present <= wanted, f"not in package-data of {package}: {sorted(map(str, present - wanted))}"
        for pattern in data.get(package, []):
            assert any(folder.glob(pattern)), f"package-data of {package} names {pattern}, which is not there"


def test_the_shipped_model_is_small() -> None:
    assert (ROOT / "hawk_compile/tools/demo/model/model.safetensors").stat().st_size <= 10e6


def test_the_backend_and_the_command_are_registered() -> None:
    (backend,) = metadata.entry_points(group="torch_dynamo_backends", name="hawk")
    assert backend.load().__name__ == "hawk"
    (command,) = metadata.entry_points(group="console_scripts", name="hawk-compile")
    assert callable(command.load())


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert hawk_compile.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {requirement.partition(";")[0].partition(">")[0].strip().lower() for requirement in wanted}
    names = {name for name in names if not name.startswith("hawk-compile[")}  # an extra that takes in another
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"
