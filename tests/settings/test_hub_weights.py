"""Head weights of a Hub repository: which strings name one, what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from hawk_compile.errors import HeadWeightsError
from hawk_compile.settings.head_weights import explicit_weights, is_hub_id, resolve
from tests.runtime.models import plain

WANTED = torch.tensor([0.1, 0.2, 0.3, 0.4])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub where every repository holds the same file; what it is asked for."""
    (tmp_path / "cached").write_text(json.dumps({"weights": [1, 2, 3, 4]}))
    asked: list[Any] = []

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(("given", "revision"), [
    ("org/name", None), ("org/name@main", "main"), ("org/name@refs/pr/1", "refs/pr/1"),
])  # fmt: skip
def test_weights_of_a_repository(hub: list[Any], given: str, revision: str | None) -> None:
    found = resolve(given, plain("llava"))
    assert hub == [("org/name", "head_weights.json", revision)] and found.origin == f"Hub {given}"
    torch.testing.assert_close(found.values, WANTED)
    torch.testing.assert_close(explicit_weights(given), WANTED)


@pytest.mark.parametrize("given", [
    "weights", "./org/name", "/org/name", "../name", "~/name", "a/b/c", "org/name.json", "org/name.safetensors",
    "org/", "/name", "org/name@", "",
])  # fmt: skip
def test_what_looks_like_a_path_stays_one(hub: list[Any], given: str) -> None:
    assert not is_hub_id(given)
    with pytest.raises(HeadWeightsError, match="there is no file"):
        resolve(given, plain("llava"))
    assert not hub


def test_what_exists_here_is_not_fetched(hub: list[Any], tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("[4, 3, 2, 1]")
    assert resolve("org/name", plain("llava")).origin == "file org/name"
    (tmp_path / "org" / "folder").mkdir()
    with pytest.raises(HeadWeightsError, match="there is no file org/folder"):
        resolve("org/folder", plain("llava"))
    assert not hub


@pytest.mark.parametrize(("kind", "match"), [
    (errors.RemoteEntryNotFoundError, "it holds no head_weights.json: give a repository that does"),
    (errors.LocalEntryNotFoundError, "the Hub cannot be reached .* connect, or give a file"),
    (errors.GatedRepoError, "access to it is granted on request: ask there and log in"),
    (errors.RepositoryNotFoundError, "there is none of this name, or it is private: correct the name"),
    (errors.RevisionNotFoundError, "it has no revision v9: correct it"),
    (errors.HFValidationError, r"fetching it failed \(HFValidationError: told so\)"),
    (RuntimeError, r"fetching it failed \(RuntimeError: told so\)"),
])  # fmt: skip
def test_what_the_hub_cannot_give(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], match: str) -> None:
    def download(*args: Any, **settings: Any) -> str:
        raise kind.__new__(kind, "told so")  # its __init__ wants a response

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(HeadWeightsError, match=f'head_weights names no file here.*"org/name@v9", and {match}') as found:
        resolve("org/name@v9", plain("llava"))
    assert found.value.__suppress_context__


def test_a_file_of_the_hub_that_holds_no_weights(hub: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cached").write_text("{}")
    with pytest.raises(HeadWeightsError, match='has no "weights"'):
        resolve("org/name", plain("llava"))
