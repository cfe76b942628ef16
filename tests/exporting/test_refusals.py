"""What export and load refuse, and that a refused export leaves nothing behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import hawk_compile
from hawk_compile.errors import (
    ConfigError,
    ExportError,
    HeadWeightsError,
    InputError,
    ManifestError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from hawk_compile.exporting import onnx
from tests import zoo

NAME = "llava"
shared: dict[str, Path] = {}


def prompt(**options: Any) -> dict[str, Any]:
    return zoo.inputs(NAME, zoo.build(NAME, layers=1), rows=[zoo.Row(images=((1, 1),))], **options)


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of its own for each test, copied from one."""
    if "onnx" not in shared:
        shared["onnx"] = tmp_path_factory.mktemp("refusals") / "onnx"
        model = zoo.build(NAME, layers=1)
        hawk_compile.export(model, prompt(), shared["onnx"], ratio=0.5, quantization="int8")
    return Path(shutil.copytree(shared["onnx"], tmp_path / "copy"))


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"format": "tflite"}, ExportError, "must be one of onnx, aoti, openvino, tensorrt, executorch, got 'tflite'"),
    ({"ratio": 1.0}, ConfigError, "ratio is the fraction of visual tokens removed"),
    ({"quantization": "int4"}, ConfigError, "quantization must be one of int8 or None, got 'int4'"),
    ({"head_weights": [1.0, 2.0]}, HeadWeightsError, "must be 4 finite numbers"),
    ({"rato": 0.5}, ConfigError, "unknown setting rato"),
    ({"backend": "eager"}, ConfigError, "unknown setting backend of format='onnx'"),
    ({"format": "aoti", "quantization": "int8"}, ConfigError, "unknown setting quantization"),
])  # fmt: skip
def test_settings(tmp_path: Path, settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ExportError, match=r'needs the package openvino.*pip install "hawk-compile\[openvino\]"'):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), tmp_path / "out", format="openvino")


def test_models_and_prompts_that_cannot_be_exported(tmp_path: Path) -> None:
    text: Any = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                             num_attention_heads=2))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="takes no images"):
        hawk_compile.export(text, {}, tmp_path / "out")
    with pytest.raises(InputError, match="inputs must hold input_ids"):
        hawk_compile.export(zoo.build(NAME, layers=1), {"inputs_embeds": torch.ones(1, 4, 64)}, tmp_path / "out")
    pixtral = zoo.build("mistral3", layers=1)
    with pytest.raises(UnsupportedModelError, match="takes image_sizes, which would be fixed in its graph"):
        sizes = zoo.inputs("mistral3", pixtral, rows=[zoo.sizes("mistral3")[1]])
        hawk_compile.export(pixtral, sizes, tmp_path / "out")
    glm = zoo.build("glm4v", layers=1)
    with pytest.raises(UnsupportedModelError, match="its encoder's visual reads the sizes of images elsewhere"):
        hawk_compile.export(glm, zoo.inputs("glm4v", glm, rows=[zoo.sizes("glm4v")[1]]), tmp_path / "out")
    with pytest.raises(InputError, match="inputs must hold a prompt with an image"):
        hawk_compile.export(zoo.build(NAME, layers=1), {"input_ids": torch.ones(1, 4).long()}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_types_that_a_runtime_does_not_have(tmp_path: Path, format: str) -> None:
    model = zoo.build(NAME, layers=1).to(torch.bfloat16)
    with pytest.raises(ExportError, match=r"runs models in float32 or float16, got one in bfloat16: give model.float"):
        hawk_compile.export(model, prompt(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way(tmp_path: Path, folder: Path) -> None:
    model, other = zoo.build(NAME, layers=1), tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match=r"must be a folder that does not exist yet.*overwrite=True"):
        hawk_compile.export(model, prompt(), folder)
    with pytest.raises(InputError, match="holds no earlier export that could be overwritten"):
        hawk_compile.export(model, prompt(), other, overwrite=True)
    assert (other / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("component", ["vision_tower", "decode"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str) -> None:
    def write(part: Any, into: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
        (into / f"{part.name}.onnx").write_bytes(b"half of it")
        if part.name == component:
            raise OSError(errno.ENOSPC, "No space left on device")
        return [f"{part.name}.onnx"], {}

    monkeypatch.setattr(onnx, "write", write)
    with pytest.raises(ExportError, match=r"No space left on device.*nothing of this export is left"):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ManifestError, match=r"is no export: it holds no manifest.json"):
        hawk_compile.load(tmp_path / "out")


def test_a_replacement_that_fails_keeps_the_earlier_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(part: Any, into: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
        (into / f"{part.name}.onnx").write_bytes(b"new")
        return [f"{part.name}.onnx"], {}

    def rename(self: Path, to: Path) -> Path:
        if to == folder and not self.name.endswith("-earlier"):
            raise OSError(errno.EACCES, "Permission denied")
        return renamed(self, to)

    renamed = Path.rename
    monkeypatch.setattr(onnx, "write", write)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Permission denied"):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), folder, overwrite=True)
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
    hawk_compile.load(folder)


def test_an_error_inside_an_exporter_names_component_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(part: Any, into: Path, options: Any) -> Any:
        raise KeyError("val")

    monkeypatch.setattr(onnx, "write", write)
    with pytest.raises(ExportError, match="vision_tower cannot be exported to onnx: 'val'"):
        hawk_compile.export(zoo.build(NAME, layers=1), prompt(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_those_that_were_exported(folder: Path) -> None:
    for name in ("prefill.onnx", "prefill.onnx.data", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ManifestError, match=f"{name} of .* is not the file that was exported"):
            hawk_compile.load(folder)
        (folder / name).unlink()
        with pytest.raises(ManifestError, match=f"lacks {name} of"):
            hawk_compile.load(folder)
        (folder / name).write_bytes(before)
    hawk_compile.load(folder)


@pytest.mark.parametrize(("change", "match"), [
    (lambda content: content | {"manifest_version": 99}, "manifest_version 99, and this release reads 3"),
    (lambda content: {name: content[name] for name in content if name != "ratio"}, "is no manifest of hawk_compile"),
    (lambda content: [content], "is no manifest of hawk_compile"),
    (lambda content: content | {"format": "tflite"}, "format must be one of"),
    (lambda content: content | {"files": content["files"] | {"../../etc/passwd": "0"}}, "lies outside"),
    (lambda content: content | {"files": {}}, "lacks .*config.json"),
    (lambda content: content | {"encoders": ["tower"]}, "lacks tower"),
    (lambda content: content | {"ids": {}}, "lacks .*end_of_turn"),
    (lambda content: content | {"head_weights": "x"}, "lacks head weights"),
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


def test_calls_that_an_exported_model_does_not_take(folder: Path) -> None:
    runner, inputs = hawk_compile.load(folder), prompt()
    assert runner.manifest.parts["decode"].details == {"quantization": "int8"}
    embeds = torch.zeros(*inputs["input_ids"].shape, 64)
    for settings, error, match in (
        ({"output_hidden_states": True, "return_dict_in_generate": True}, UnsupportedCallError, "logits only"),
        ({"ratio": 1.5}, ConfigError, "ratio is the fraction"),
        ({"inputs_embeds": embeds}, UnsupportedCallError, "takes input_ids"),
        ({"use_cache": False}, UnsupportedCallError, "use_cache=False: an exported model keeps"),
        ({"generation_config": GenerationConfig(use_cache=False)}, UnsupportedCallError, "use_cache=False"),
        ({"cache_implementation": "static"}, UnsupportedCallError, "cache_implementation='static'"),
    ):
        with pytest.raises(error, match=match):
            runner.generate(**inputs, max_new_tokens=2, **settings)
    cache = StaticCache(config=zoo.build(NAME, layers=1).config.get_text_config(), max_cache_len=99)
    with pytest.raises(UnsupportedCallError, match=r"plain DynamicCache\(\), got StaticLayer"):
        runner.generate(**inputs, max_new_tokens=3, past_key_values=cache)
    with pytest.raises(InputError, match="position_ids are needed"):
        runner.model(**inputs)
    fewer = inputs | {"pixel_values": inputs["pixel_values"][:, :, :-1]}
    with pytest.raises(InputError, match="pixel_values of vision_tower must have shape"):
        runner.generate(**fewer, max_new_tokens=2)
    text = {"input_ids": inputs["input_ids"][:, -4:], "position_ids": torch.arange(4)[None]}
    with pytest.raises(UnsupportedCallError, match="logits of the last position alone, and logits_to_keep=0"):
        runner.model(**text, logits_to_keep=0)
    with pytest.raises(UnsupportedCallError, match="leave out assisted decoding"):
        runner.generate(torch.tensor([[30, 31, 30, 31, 30]]), max_new_tokens=3, prompt_lookup_num_tokens=1)
    first = runner.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
    with pytest.raises(UnsupportedCallError, match="an exported prefill starts a conversation"):
        runner.generate(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=first.past_key_values,
                        attention_mask=torch.ones_like(ids), max_new_tokens=2)  # fmt: skip
    assert isinstance(first.past_key_values, DynamicCache)
