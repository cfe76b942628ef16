"""TensorRT: engines of the demo model for three capabilities, in fp16 and bf16, and what is refused.

Engines are built here and not run, which takes a GPU. The ONNX files that they are built from are run, by ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import hawk_compile
from hawk_compile.errors import ConfigError, ExportError, InputError
from hawk_compile.exporting import manifest as manifests
from hawk_compile.exporting import profile, tensorrt, write
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.manifest import Manifest
from hawk_compile.exporting.parts import write_part
from hawk_compile.exporting.settings import settings_of
from tests.exporting import demo
from tests.exporting.test_profile import LONG

CAPABILITIES = ("8.6", "8.9", "12.0")
SHORT = {"prompt": (64, 256, 1024)}
PARTS = ("visual", "prefill", "decode")


def export(folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[Manifest, list[str]]:
    """The manifest, and every warning or error of TensorRT on the way, harmless or not."""
    model, inputs = demo.cut(dtype), demo.batch([(336, 364)])
    seen: list[str] = []
    build = tensorrt.build

    def observed(*args: Any) -> Any:
        result = build(*args)
        seen.extend(text for _, text in tensorrt.logger().messages)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "build", observed)
        manifest = hawk_compile.export(model, inputs, folder, format="tensorrt", **settings)
    return manifest, seen


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """fp16, all capabilities, prompts longer than TensorRT can sort."""
    folder = tmp_path_factory.mktemp("tensorrt") / "half"
    manifest, seen = export(folder, torch.float16, sizes=LONG)
    yield SimpleNamespace(folder=folder, manifest=manifest, seen=seen)
    shutil.rmtree(folder)


class Small(nn.Module):
    """What stands at the start of a prefill, in place of all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 64, dtype=torch.float16)

    def forward(self, input_ids: torch.Tensor, image_features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.embed(input_ids) + image_features.mean(0)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """As `half`, of a few operators."""
    folder = tmp_path_factory.mktemp("tensorrt")
    given = {"input_ids": torch.ones(2, 20, dtype=torch.int64), "image_features": torch.ones(24, 64).half()}
    shapes = {"input_ids": ("batch", "prompt"), "image_features": ("visual", 64)}
    part = write_part(
        tensorrt, Component("prefill", Small(), given, shapes), folder, tensorrt.options({"sizes": LONG})
    )
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(parts={"prefill": part}))


@pytest.fixture(params=["small", pytest.param("half", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.getfixturevalue(request.param)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def check_engines(folder: Path, manifest: Manifest, seen: list[str], wanted: tuple[str, ...]) -> None:
    assert tuple(manifest.parts) == PARTS
    for name, part in manifest.parts.items():
        assert part.file == f"{name}.onnx" and part.details["warnings"] == []
        assert tuple(part.details["engines"]) == wanted
        for capability, engine in part.details["engines"].items():
            assert engine["file"] == f"{name}.sm{capability.replace('.', '')}.engine"
            assert engine["file"] in part.sha256 and engine["seconds"] > 0
            assert (folder / engine["file"]).stat().st_size == engine["bytes"] > 10**6
    assert seen and all(any(pattern.search(text) for pattern in tensorrt.HARMLESS) for text in seen), seen


def test_an_engine_for_each_capability(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    part = small.manifest.parts["prefill"]
    assert part.file == "prefill.onnx" and tuple(part.details["engines"]) == CAPABILITIES
    for engine in part.details["engines"].values():
        assert engine["file"] in part.sha256 and (small.folder / engine["file"]).stat().st_size == engine["bytes"] > 0
    for capability, file in (((12, 0), "prefill.sm120.engine"), ((9, 0), None), (None, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=capability: found is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        if file is not None:
            assert tensorrt.engine_for(part)["file"] == file
        else:
            with pytest.raises(ExportError, match=r"capability 8\.6, 8\.9, 12\.0, and .*: load it on"):
                tensorrt.engine_for(part)


@pytest.mark.slow
def test_every_component_in_half_precision(half: SimpleNamespace) -> None:
    check_engines(half.folder, half.manifest, half.seen, CAPABILITIES)
    assert half.manifest.dtype == "float16" and half.manifest.format == "tensorrt"
    assert manifests.read(half.folder) == half.manifest
    assert {"tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs"} <= half.manifest.versions.keys()


@pytest.mark.slow
def test_the_prefill_in_bfloat16(tmp_path: Path) -> None:
    """And prompts that TensorRT can sort: one TopK over the row, and none elsewhere."""
    model, inputs = demo.cut(torch.bfloat16), demo.batch([(336, 364)])
    options = tensorrt.options({"sizes": SHORT, "compute_capabilities": ["8.9"]})
    weights = torch.full((model.config.get_text_config().num_attention_heads,), 0.125)
    config = hawk_compile.HawkConfig(ratio=0.8)
    sorts = {}
    for component in write.components(model, inputs, config, weights, True, options):
        if component.name == "prefill":
            files, details = tensorrt.write(component, tmp_path, options)
            assert details["warnings"] == [] and f"{component.name}.sm89.engine" in files
            sorts[component.name] = operators(tmp_path / f"{component.name}.onnx").count("TopK")
            break
    assert sorts == {"prefill": 1}


@pytest.mark.slow
def test_nothing_is_sorted_where_prompts_are_long(half: SimpleNamespace) -> None:
    for name in PARTS:
        assert "TopK" not in operators(half.folder / f"{name}.onnx")


@pytest.mark.parametrize("longest, expected", [(3840, "sort"), (3841, "threshold")])
def test_selection(longest: int, expected: str) -> None:
    settings = {"sizes": {"prompt": (16, 512, longest)}, "normalization": "minmax"}
    config, options = settings_of(tensorrt, "tensorrt", None, settings)
    assert (options.selection, config.normalization) == (expected, "minmax")
    assert tensorrt.options({}).selection == "sort"


@pytest.mark.slow
def test_the_graphs_answer_as_pytorch(half: SimpleNamespace, tmp_path: Path) -> None:
    """What the engines were built from, run by ONNX Runtime: threshold selection, and a scatter in place of a sort."""
    folder = tmp_path / "onnx"
    shutil.copytree(half.folder, folder, ignore=shutil.ignore_patterns("*.engine"))
    parts = {
        name: dataclasses.replace(
            part,
            sha256={file: found for file, found in part.sha256.items() if not file.endswith(".engine")},
            details={},
        )
        for name, part in half.manifest.parts.items()
    }
    dataclasses.replace(half.manifest, format="onnx", parts=parts).write(folder)
    model, inputs = demo.cut(torch.float16), demo.batch([(336, 364)])
    runner = hawk_compile.load(folder)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = runner.generate(**inputs, **settings)
    hawk_compile.optimize(model, ratio=half.manifest.ratio, backend="eager")
    expected = model.generate(**inputs, **settings)
    assert found.sequences.equal(expected.sequences)
    one, other = runner.report(), hawk_compile.report(model)
    assert one.kept_visual_tokens.equal(other.kept_visual_tokens)
    for given, wanted in zip(found.logits, expected.logits, strict=True):
        # 10 bits of mantissa over three layers, and logits of about 20.
        torch.testing.assert_close(given.float(), wanted.float(), atol=0.1, rtol=0.02)


def test_trtexec_names_every_dynamic_input(built: SimpleNamespace) -> None:
    for name, part in built.manifest.parts.items():
        command, *options = shlex.split(part.details["trtexec"])
        given = dict(option.split("=", 1) for option in options if "=" in option)
        assert command == "trtexec" and "--stronglyTyped" in options
        assert given["--onnx"] == f"{name}.onnx" and given["--saveEngine"] == f"{name}.engine"
        ranges = part.details["profile"]
        for which, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            shapes = dict(each.split(":") for each in given[option].split(","))
            assert shapes == {
                spec.name: "x".join(str(size if isinstance(size, int) else ranges[size][which]) for size in spec.shape)
                for spec in part.inputs
                if any(isinstance(size, str) for size in spec.shape)
            }
    assert "input_ids:1x64" in built.manifest.parts["prefill"].details["trtexec"]
    assert "input_ids:2x4096" in built.manifest.parts["prefill"].details["trtexec"]


@pytest.mark.slow
def test_sizes_of_a_model_follow_from_those_given(half: SimpleNamespace) -> None:
    visual, prefill, decode = (half.manifest.parts[name].details["profile"] for name in PARTS)
    assert all(tuple(prefill[name]) == LONG[name] for name in ("batch", "prompt", "visual"))
    assert prefill["kept"][0] == 2 < prefill["kept"][1] < 256 and prefill["kept"][2] == 4096
    assert decode == {"batch": [1, 1, 2], "new": [1, 1, 4096], "past": [0, 256, 8192], "total": [1, 257, 12288]}
    assert visual["patches"] == [4 * size for size in LONG["visual"]]
    assert visual["merged_patches"] == list(LONG["visual"])
    assert visual["segments"] == [1, 1, 2] and visual["longest_segment"] == [128, 640, 16384]
    assert visual["longest_window"] == [1, 64, 64] and visual["windows"][2] >= 4096 // 16 * 2.6


@pytest.mark.parametrize(
    "capabilities, message",
    [
        (["9.9"], r"compute_capabilities holds '9\.9', and the TensorRT installed here builds for .*8\.6, 8\.9, 12\.0"),
        ([8.9], r"holds 8\.9, and the TensorRT"),
        ("8.9", r"compute_capabilities must be a list such as .*, got '8\.9'"),
        ([], r"compute_capabilities must be a list such as .*, got \[\]"),
    ],
)
def test_compute_capabilities_are_refused(capabilities: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensorrt.options({"compute_capabilities": capabilities})


def test_sizes_belong_to_this_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting sizes"):
        hawk_compile.export(nn.Identity(), {}, tmp_path / "out", format="onnx", sizes={})  # type: ignore[arg-type]


def feed(manifest: Manifest, **sizes: int) -> dict[str, torch.Tensor]:
    """Inputs of the prefill in its usual sizes, but for those named."""
    part = manifest.parts["prefill"]
    usual = {name: size[1] for name, size in part.details["profile"].items()} | sizes
    return {
        spec.name: torch.empty([size if isinstance(size, int) else usual[size] for size in spec.shape])
        for spec in part.inputs
    }


def test_sizes_inside_the_profile(built: SimpleNamespace) -> None:
    for inside in ({}, {"prompt": 64}, {"prompt": 4096}, {"batch": 2, "visual": 4096}):
        profile.check_sizes(built.manifest.parts["prefill"], feed(built.manifest, **inside))


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"prompt": 4097},
            r"input_ids of prefill has size 4097 in dimension 1 \(prompt\), and prefill was built for 64 to 4096: "
            r'give inputs of that size, or export again with sizes=\{"prompt": \(64, 256, 4097\)\}',
        ),
        ({"prompt": 63}, r"has size 63 in dimension 1 \(prompt\).* 64 to 4096: .*\(63, 256, 4096\)"),
        ({"batch": 3}, r"input_ids of prefill has size 3 in dimension 0 \(batch\)"),
        ({"visual": 5000}, r"image_features of prefill has size 5000 in dimension 0 \(visual\)"),
    ],
)
def test_sizes_outside_the_profile(built: SimpleNamespace, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        profile.check_sizes(built.manifest.parts["prefill"], feed(built.manifest, **sizes))


@pytest.mark.slow
def test_an_engine_needs_its_gpu(half: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = r"visual was built for GPUs of compute capability 8\.6, 8\.9, 12\.0, and torch finds none here: load it"
    with pytest.raises(ExportError, match=message):
        hawk_compile.load(half.folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ExportError, match=r"capability 8\.6, 8\.9, 12\.0, and this one has 9\.0: load it on"):
        hawk_compile.load(half.folder)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert tensorrt.engine_for(half.manifest.parts["decode"])["file"] == "decode.sm120.engine"
