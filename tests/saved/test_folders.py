"""Folders that do not fit, or that somebody else has written: refused by name, before anything of them is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile.errors import HawkError, InputError, ManifestError
from hawk_compile.exporting.manifest import FILE_NAME, MOST_BYTES
from hawk_compile.files import digest_of
from hawk_compile.saved.key import key_of, modules_key
from hawk_compile.saved.manifest import Manifest, Part
from tests import zoo
from tests.hostile import NO_JSON

FILE = "prefill_0.pt2"


@pytest.fixture(scope="module")
def model() -> Any:
    return hawk_compile.optimize(zoo.build("llava", layers=1), ratio=0.6)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """One that fits, but for its package, which is none."""
    place = tmp_path / "compiled"
    place.mkdir()
    (place / FILE).write_bytes(b"no package")
    with torch.no_grad():
        key, modules = key_of(model, model.__dict__["_hawk_runtime"].prefill), modules_key(model)
    digest = digest_of(place / FILE, HawkError, "")
    part = Part(FILE, {FILE: digest}, [0], ["list", []], [["s0", 4]], {"s0": [0, 0]}, {"s0": [2, None]}, [True],
                ["tuple", [["result", 0]]], 0)  # fmt: skip
    Manifest(key, modules, {"prefill_0": part}).write(place)
    return place


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / FILE_NAME).read_text())
    change(content)
    (folder / FILE_NAME).write_text(json.dumps(content))


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        hawk_compile.load_compiled(model, folder)
    assert model.__dict__["_hawk_runtime"].prefill.saved is None
    return str(caught.value)


def test_a_package_that_cannot_be_opened(model: Any, folder: Path) -> None:
    """Everything before it was taken."""
    assert f"{FILE} of" in (text := refusal(model, folder)) and "cannot be opened" in text


@pytest.mark.parametrize(
    "name",
    ["hawk-compile", "torch", "transformers", "python", "system", "processor", "hawk_compile's sources",
     "torch's switches", "setting normalization", "setting ranking", "passes left out", "model", "config text_config",
     "attention", "attention by AttentionInterface", "code of transformers.models.llava.modeling_llava:LlavaModel"],
)  # fmt: skip
def test_what_differs_is_named(model: Any, folder: Path, name: str) -> None:
    changed(folder, lambda content: content["key"].update({name: "another"}))
    assert f"were saved where {name} was another, and here it is" in refusal(model, folder)


def test_a_key_that_is_not_there_is_no_equal_one(model: Any, folder: Path) -> None:
    changed(folder, lambda content: content["key"].pop("torch"))
    assert "where torch was not there" in refusal(model, folder)
    changed(folder, lambda content: content["modules"].update({"model.more": "x"}))
    changed(folder, lambda content: content["key"].update(torch=key_now(model)["torch"]))
    assert "where module model.more was x" in refusal(model, folder)


def key_now(model: Any) -> dict[str, str]:
    with torch.no_grad():
        return key_of(model, model.__dict__["_hawk_runtime"].prefill)


STATES: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "train": ("module ", lambda model: model.train(), lambda model: model.eval()),
    "hook": (
        "module model.language_model.layers.0.mlp",
        lambda model: handles.append(mlp(model).register_forward_hook(lambda *args: None)),
        lambda model: handles.pop().remove(),
    ),
    "dtype": ("config dtype", lambda model: model.half(), lambda model: model.float()),
    "settings": (
        "setting normalization",
        lambda model: hawk_compile.optimize(model, ratio=0.6, normalization="softmax"),
        lambda model: hawk_compile.optimize(model, ratio=0.6, normalization="l2"),
    ),
    "selector": (
        "setting ",
        lambda model: hawk_compile.optimize(model, ratio=0.6, selector="hawk_diverse"),
        lambda model: hawk_compile.optimize(model, ratio=0.6, normalization="l2"),
    ),
}  # fmt: skip
handles: list[Any] = []


def mlp(model: Any) -> Any:
    return model.base_model.get_decoder().layers[0].mlp


@pytest.mark.parametrize("state", STATES)
def test_a_model_in_another_state(model: Any, folder: Path, state: str) -> None:
    name, change, undo = STATES[state]
    with torch.no_grad():
        change(model)
    try:
        text = refusal(model, folder)
        assert any(each in text for each in (f"where {name}", "where module")), text
    finally:
        undo(model)
    assert "cannot be opened" in refusal(model, folder)


def test_passes_that_are_left_out(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWK_DISABLE", "replace_masked_scatter")
    assert "passes left out was none, and here it is replace_masked_scatter" in refusal(model, folder)


def test_code_of_the_model_that_was_replaced(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(mlp(model)), "forward", lambda self, values: values)
    assert "where code of " in refusal(model, folder)


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kind": lambda content: content.update(kind="onnx"),
    "no kind": lambda content: content.pop("kind"),
    "version": lambda content: content.update(manifest_version=99),
    "no parts": lambda content: content.update(parts={}),
    "unknown": lambda content: content.update(more=1),
    "a list for the key": lambda content: content.update(key=[]),
    "no hash": lambda content: content["parts"]["prefill_0"].update(sha256={}),
    "another hash": lambda content: content["parts"]["prefill_0"].update(sha256={FILE: "0" * 64}),
    "a tensor that no call has": lambda content: content["parts"]["prefill_0"].update(inputs=[7]),
    "a weight that is none": lambda content: content["parts"]["prefill_0"].update(inputs=["no.weight"]),
    "a symbol of no tensor": lambda content: content["parts"]["prefill_0"].update(symbols={"s0": [0, 9]}),
    "no range": lambda content: content["parts"]["prefill_0"].update(ranges={}),
    "an unknown function": lambda content: content["parts"]["prefill_0"].update(conditions=[["system", "s0"]]),
    "an unknown symbol": lambda content: content["parts"]["prefill_0"].update(conditions=[["Add", "s1"]]),
    "a deep condition": lambda content: content["parts"]["prefill_0"].update(conditions=[deep(50)]),
    "no recipe": lambda content: content["parts"]["prefill_0"].update(recipe=["run", "rm"]),
    "a class that is no output": lambda content: content["parts"]["prefill_0"].update(
        recipe=["output", "os:PathLike", []]),
    "a deep recipe": lambda content: content["parts"]["prefill_0"].update(recipe=nested(200)),
}  # fmt: skip


def deep(depth: int) -> Any:
    return ["Not", deep(depth - 1)] if depth else True


def nested(depth: int) -> Any:
    return ["list", [nested(depth - 1)]] if depth else ["plain", "int", 1]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_that_is_wrong(model: Any, folder: Path, wrong: str) -> None:
    changed(folder, WRONG[wrong])
    assert "prefill_0.pt2 of" not in (text := refusal(model, folder)) or wrong in ("a weight that is none",), text
    assert text.count(":")


@pytest.mark.parametrize("name", ["../prefill_0.pt2", "/etc/passwd", "a\0b", "x/y.pt2", "..", ""])
def test_names_that_lead_out(model: Any, folder: Path, name: str) -> None:
    changed(folder, lambda content: content["parts"]["prefill_0"].update(file=name, sha256={name: "0" * 64}))
    assert "outside" in refusal(model, folder)


@pytest.mark.parametrize("name", [FILE_NAME, FILE])
def test_links_that_lead_out(model: Any, folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    assert "symbolic link" in refusal(model, folder)


@pytest.mark.parametrize("name", [FILE_NAME, FILE])
def test_files_that_are_missing_or_cut_off(model: Any, folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    assert "is no JSON" in (text := refusal(model, folder)) or "is not the file that was saved" in text
    (folder / name).unlink()
    assert "holds no compiled graphs" in (text := refusal(model, folder)) or f"lacks {name}" in text


@pytest.mark.parametrize("what", NO_JSON)
def test_what_is_no_json(model: Any, folder: Path, what: str) -> None:
    (folder / FILE_NAME).write_bytes(NO_JSON[what])
    refusal(model, folder)


def test_a_manifest_that_is_huge_is_not_read(model: Any, folder: Path) -> None:
    with (folder / FILE_NAME).open("r+b") as file:
        os.truncate(file.fileno(), MOST_BYTES + 1)
    assert f"at most {MOST_BYTES} are read" in refusal(model, folder)


def test_an_export_is_no_folder_of_graphs_and_the_other_way_round(model: Any, folder: Path) -> None:
    with pytest.raises(ManifestError):
        hawk_compile.load(folder)
    changed(folder, lambda content: content.pop("kind"))
    assert "hawk_compile.load takes those of export" in refusal(model, folder)


@pytest.mark.parametrize("given", [None, 7, b"x"])
def test_what_is_no_path(model: Any, given: Any) -> None:
    with pytest.raises(HawkError):
        hawk_compile.load_compiled(model, given)
    with pytest.raises(HawkError):
        hawk_compile.save_compiled(model, given)


def test_models_that_are_not_taken(tmp_path: Path) -> None:
    plain = zoo.build("llava", layers=1)
    for given, text in (
        (plain, "call hawk_compile.optimize first"),
        ("model", "got str"),
        (hawk_compile.optimize(zoo.build("llava", layers=1), backend="eager"), 'backend="inductor"'),
    ):
        for call in (hawk_compile.save_compiled, hawk_compile.load_compiled):
            with pytest.raises(InputError, match=text):
                call(given, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_nothing_is_saved_of_a_model_that_has_had_no_prompt(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"had none: call hawk_compile\.warm_up"):
        hawk_compile.save_compiled(model, tmp_path / "folder")
    assert not [*tmp_path.iterdir()]
