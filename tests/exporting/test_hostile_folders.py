"""Folders that say they are exports and were written, or changed, by somebody else: refused by name, before anything of
them is run; and folders in the way of an export, of which nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save_file

import hawk_compile
from hawk_compile.errors import ExportError, HawkError, InputError, ManifestError
from hawk_compile.exporting import folder as folders
from hawk_compile.exporting import manifest as manifests
from hawk_compile.exporting.folder import written_whole
from hawk_compile.exporting.write import HOST_WEIGHTS
from tests.exporting.test_writing import write_export
from tests.hostile import NO_JSON, mutated, other_value, places, refused, taken_or_refused


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "out"
    write_export(path)
    return path


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(folder: Path, name: str, content: bytes) -> None:
    """A file with the hash that its manifest says: who writes a folder writes that too."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize("name", NO_JSON)
def test_a_manifest_that_is_no_json(folder: Path, name: str) -> None:
    (folder / "manifest.json").write_bytes(NO_JSON[name])
    with refused(ManifestError):
        hawk_compile.load(folder)


def test_a_manifest_that_is_no_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "places").mkdir()
    for place in places(tmp_path / "places").values():
        (folder / "manifest.json").unlink(missing_ok=True)
        if "\0" in str(place) or len(place.name) > 255:
            continue
        (folder / "manifest.json").symlink_to(place)
        with refused(ManifestError):
            hawk_compile.load(folder)


@pytest.mark.parametrize("name", [
    "../manifest.json", "/etc/passwd", "sub/config.json", "./config.json", "..", ".", "", "a\0b", "..\\config.json",
    "C:\\config.json", "C:config.json", "//host/share", "\\\\host\\share", "~/x", "config.json\n", "%2e%2e/x",
    "x" * 5000,
], ids=lambda name: repr(name[:20]))  # fmt: skip
def test_names_that_lead_out_of_the_folder(folder: Path, name: str) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    digest = manifests.file_digest(folder / "config.json")
    change(folder, files=content["files"] | {name: digest})
    with refused(ManifestError):
        hawk_compile.load(folder)
    parts = content["parts"]
    parts["decode"] |= {"file": name, "sha256": {name: digest}}
    change(folder, files=content["files"], parts=parts)
    with refused(ManifestError):
        hawk_compile.load(folder)


def test_symbolic_links(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ManifestError, match=r"config\.json is a symbolic link, whose file lies outside"):
        manifests.read(folder)
    (folder / "config.json").unlink()
    outside.rename(folder / "renamed.json")
    (folder / "config.json").symlink_to("renamed.json")
    manifests.read(folder)  # within the folder


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--me--export"
    snapshot, blobs = home / "snapshots" / "0123abcd", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    assert manifests.read(snapshot) == manifests.read(folder)
    (home / "secret").write_bytes((blobs / "0").read_bytes())
    first = sorted(snapshot.iterdir())[0]
    first.unlink()
    first.symlink_to(home / "secret")
    with pytest.raises(ManifestError, match="is a symbolic link"):
        manifests.read(snapshot)


def test_a_file_that_is_a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with refused(ManifestError):
        hawk_compile.load(folder)


def config(**changes: Any) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        put(folder, "config.json", json.dumps(content | changes).encode())

    return made


def host_weights(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        save_file(tensors, folder / HOST_WEIGHTS)
        put(folder, HOST_WEIGHTS, (folder / HOST_WEIGHTS).read_bytes())

    return made


def parts(role: str, **changes: Any) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())["parts"]
        change(folder, parts=content | {role: content[role] | changes})

    return made


HOSTILE: dict[str, Callable[[Path], None]] = {
    "code of its own": config(auto_map={"AutoConfig": "evil.Evil"}, model_type="evil"),
    "a kernel of the Hub": config(attn_implementation="evil/kernel"),
    "a kernel of the Hub by its inner name": config(_attn_implementation="evil/kernel@main:function"),
    "a billion layers": config(text_config={"model_type": "llama", "num_hidden_layers": 10**9}),
    "no model": config(model_type="bert"),
    "an unknown model": config(model_type="nonsense"),
    "no configuration": lambda folder: put(folder, "config.json", b"[]"),
    "deep": lambda folder: put(folder, "config.json", b"[" * 100_000),
    "no settings of generate": lambda folder: put(folder, "generation_config.json", b"{"),
    "a parameter that is none": host_weights(forward=torch.ones(1)),
    "a class": host_weights(__class__=torch.ones(1)),
    "no tensors": lambda folder: put(folder, HOST_WEIGHTS, b"\x80\x04\x95"),
    "no weights of heads": lambda folder: change(folder, head_weights=[1.0, -1.0]),
    "an encoder of the system": lambda folder: change(folder, encoders=["os.path"]),
    "a dtype that is a function": lambda folder: change(folder, dtype="load"),
    "a device": lambda folder: change(folder, device="cuda:99"),
    "a part that is no graph": lambda folder: None,
    "another format": lambda folder: change(folder, format="openvino"),
    "a format that is a module": lambda folder: change(folder, format="runner"),
    "sizes that are none": parts("prefill", inputs=[{"name": "x", "dtype": "float32", "shape": [None]}]),
    "an input twice there": parts("prefill", inputs=5),
    "weights elsewhere": parts("decode", details={"weights": {"../../secret.safetensors": {"a": "b"}}}),
    "engines elsewhere": parts("decode", details={"engines": {"8.9": {"file": "/dev/zero"}}}),
    "engines that are none": parts("decode", details={"engines": [1]}),
    "a selector": lambda folder: change(folder, selector="hawk", selector_options={"x": 1}),
    "a ratio": lambda folder: change(folder, ratio=1e308),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_folder_may_not_say(folder: Path, name: str) -> None:
    HOSTILE[name](folder)
    with refused(HawkError):
        hawk_compile.load(folder)


def test_a_kernel_is_refused_that_is_named_for_a_part(folder: Path) -> None:
    config(attn_implementation={"text_config": "kernels-community/attention"})(folder)
    with pytest.raises(ManifestError, match="names the attention kernels-community/attention of the Hub"):
        hawk_compile.load(folder)


def fuzz(folder: Path, valid: bytes, seed: int) -> None:
    draw = random.Random(seed)
    other = json.dumps(other_value(json.loads(valid), draw)).encode()
    (folder / "manifest.json").write_bytes(mutated(valid, draw) if draw.random() < 0.3 else other)
    taken_or_refused(lambda: manifests.config_of(manifests.read(folder)))


@examples(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutations_of_a_manifest(written: Path, seed: int) -> None:
    fuzz_copy(written, seed)


@pytest.mark.slow
@examples(max_examples=2000, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_many_mutations_of_a_manifest(written: Path, seed: int) -> None:
    fuzz_copy(written, seed)


def fuzz_copy(written: Path, seed: int) -> None:
    copy = written.with_name("fuzzed")
    if not copy.exists():
        shutil.copytree(written, copy)
    fuzz(copy, (written / "manifest.json").read_bytes(), seed)


def test_a_folder_of_somebody_else_is_not_deleted(tmp_path: Path) -> None:
    """As that of a browser's extension, whose manifest.json is another."""
    path = tmp_path / "extension"
    path.mkdir()
    for content in ('{"manifest_version": 3, "name": "mine"}', "[]", "{", '{"manifest_version": 5, "parts": 1}'):
        (path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match="holds no earlier export"):
            write_export(path, overwrite=True)
    assert (path / "manifest.json").read_text() == content


def test_what_lies_beside_an_export_is_not_deleted(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"beside an earlier export it holds notes\.txt, which would be deleted"):
        write_export(folder, overwrite=True)
    (folder / "notes.txt").unlink()
    (folder / "results").mkdir()
    with pytest.raises(InputError, match="results"):
        write_export(folder, overwrite=True)
    manifests.read(folder)


def test_what_appears_while_an_export_is_written_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(InputError, match="must be a folder that does not exist yet"), written_whole(path, True) as made:
        (made / "manifest.json").write_text("{}")
        path.mkdir()
        (path / "precious.txt").write_text("mine")
    assert (path / "precious.txt").read_text() == "mine" and [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_one(folder: Path, tmp_path: Path) -> None:
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(folder)
    dangling.symlink_to(tmp_path / "new")
    write_export(link, overwrite=True)
    assert link.is_symlink() and manifests.read(folder)
    write_export(dangling)
    assert dangling.is_symlink() and manifests.read(tmp_path / "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy", "dangling", "link", "new"]


def test_places_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for name in ("loop", "a\0b", "n" * 300, "file", "file/inside", "loop/inside"):
        with refused((ExportError, InputError)):
            write_export(tmp_path / name)
        with refused((ExportError, InputError)):
            write_export(tmp_path / name, overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_an_export_that_is_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def broken(component: Any, into: Path, options: Any) -> Any:
        (into / "half").write_text("of it")
        raise error

    with pytest.raises((error, HawkError)):
        write_export(tmp_path / "out", write=broken)
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_is_interrupted_keeps_the_earlier_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = manifests.read(folder), Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if to == folder and not self.name.endswith("-earlier"):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(folders.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_export(folder, overwrite=True)
    assert manifests.read(folder) == before and [each.name for each in folder.parent.iterdir()] == ["copy"]
