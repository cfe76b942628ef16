"""The folder of an export, written from components that cost nothing: whole or not at all, and read back or refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hawk_compile
from hawk_compile.errors import ExportError, InputError, ManifestError
from hawk_compile.exporting import manifest as manifests
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.folder import written_whole
from hawk_compile.exporting.parts import write_parts
from hawk_compile.exporting.write import manifest_of, save_beside
from hawk_compile.plan.chat import Chat
from hawk_compile.settings.head_weights import resolve
from tests import zoo

CONFIG = hawk_compile.HawkConfig(ratio=0.5)
NAMES = ("vision_tower", "prefill", "decode")


class Doubled(nn.Module):
    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {"rows": 2 * rows}


def write(component: Component, folder: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
    """A file of each component's own, and one that they share, to which each adds."""
    (folder / f"{component.name}.onnx").write_text(component.name)
    with (folder / "shared.bin").open("a") as shared:
        shared.write(component.name)
    return [f"{component.name}.onnx", "shared.bin"], {"options": options}


def target(write: Any = write) -> Any:
    return SimpleNamespace(__name__="hawk_compile.exporting.onnx", PACKAGES=(), write=write)


def components() -> Iterator[Component]:
    for name in NAMES:
        yield Component(name, Doubled(), {"rows": torch.ones(2, 3)}, {"rows": ("batch", 3)})


def write_export(path: Path, *, overwrite: bool = False, write: Any = write, told: Any = lambda line: None) -> None:
    model = zoo.build("llava", layers=1)
    with written_whole(path, overwrite) as folder:
        parts = write_parts(target(write), components(), folder, "some", told)
        save_beside(model, None, folder)
        weights = resolve("auto", model)
        manifest_of(model, CONFIG, weights, target(), "onnx", parts, folder, Chat()).write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_export(tmp_path / "out")
    return tmp_path / "out"


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    told: list[hawk_compile.Progress] = []
    write_export(tmp_path / "out", told=told.append)
    assert [now.text.split(":")[0] for now in told if now.text] == list(NAMES)
    manifest = manifests.read(tmp_path / "out")
    assert list(manifest.parts) == list(NAMES) and manifest.encoders == ["vision_tower"] and manifest.ratio == 0.5
    part = manifest.parts["prefill"]
    assert part.file == "prefill.onnx" and part.details == {"options": "some"}
    assert part.inputs == [manifests.TensorSpec("rows", "float32", ["batch", 3])]
    shared = {each.sha256["shared.bin"] for each in manifest.parts.values()}
    assert shared == {manifests.file_digest(tmp_path / "out/shared.bin")}  # as it is when all have been written
    assert {"config.json", "generation_config.json"} <= manifest.files.keys()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("component", ["vision_tower", "decode"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, component: str) -> None:
    def full(part: Component, into: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
        if part.name == component:
            (into / f"{part.name}.onnx").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(part, into, options)

    with pytest.raises(ExportError, match=r"No space left on device.*nothing of this export is left"):
        write_export(tmp_path / "out", write=full)
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_fails_keeps_the_earlier_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, to: Path) -> Path:
        if to == folder and not self.name.endswith("-earlier"):
            raise OSError(errno.EACCES, "Permission denied")
        return renamed(self, to)

    renamed, before = Path.rename, manifests.read(folder)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Permission denied"):
        write_export(folder, overwrite=True)
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
    assert manifests.read(folder) == before


def test_a_replacement_takes_the_place_of_the_earlier_export(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "of_the_earlier").touch()
    (folder / "manifest.json").write_text(json.dumps(content | {"files": content["files"] | {"of_the_earlier": ""}}))
    write_export(folder, overwrite=True)
    assert not (folder / "of_the_earlier").exists() and [each.name for each in folder.parent.iterdir()] == [folder.name]


def test_a_folder_in_the_way(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match=r"must be a folder that does not exist yet.*overwrite=True"):
        write_export(folder)
    with pytest.raises(InputError, match="holds no earlier export that could be overwritten"):
        write_export(other, overwrite=True)
    assert (other / "precious.txt").read_text() == "mine"


def test_an_error_inside_an_exporter_names_component_and_format(tmp_path: Path) -> None:
    def broken(part: Component, into: Path, options: Any) -> Any:
        raise KeyError("val")

    named = r"vision_tower cannot be exported to onnx \(KeyError: 'val'; .*export to another format"
    with pytest.raises(ExportError, match=named):
        write_export(tmp_path / "out", write=broken)
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_those_that_were_exported(folder: Path) -> None:
    for name in ("prefill.onnx", "shared.bin", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ManifestError, match=f"{name} of .* is not the file that was exported"):
            hawk_compile.load(folder)
        (folder / name).unlink()
        with pytest.raises(ManifestError, match=f"lacks {name} of"):
            hawk_compile.load(folder)
        (folder / name).write_bytes(before)
    manifests.read(folder)


@pytest.mark.parametrize(("change", "match"), [
    (lambda content: content | {"manifest_version": 99}, "manifest_version 99, and this release reads 5"),
    (lambda content: {name: content[name] for name in content if name != "ratio"}, "is no manifest of hawk_compile"),
    (lambda content: [content], "is no manifest of hawk_compile"),
    (lambda content: content | {"format": "tflite"}, "format must be one of"),
    (lambda content: content | {"files": content["files"] | {"../../etc/passwd": "0"}}, "lies outside"),
    (lambda content: content | {"files": {}}, "lacks .*config.json"),
    (lambda content: content | {"encoders": ["tower"]}, "lacks tower"),
    (lambda content: content | {"ids": {}}, "lacks .*end_of_turn"),
    (lambda content: content | {"head_weights": "x"}, "head_weights must be list.float., got 'x'"),
    (lambda content: content | {"parts": {k: p | {"file": "../evil.onnx"} for k, p in content["parts"].items()}},
     r"lacks \.\./evil\.onnx"),
])  # fmt: skip
def test_manifests_that_cannot_be_read(folder: Path, change: Any, match: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises((ManifestError, ExportError), match=match):
        hawk_compile.load(folder)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is no export: it holds no manifest\.json"):
        hawk_compile.load(tmp_path)
