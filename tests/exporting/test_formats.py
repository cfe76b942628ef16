"""The shipped model in ONNX, held to the optimised model in PyTorch.

`benchmarks/export.py agreement` does the same for every format.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import hawk_compile
from hawk_compile.exporting.check import compare
from hawk_compile.exporting.manifest import file_digest
from hawk_compile.exporting.quantize import quantize
from hawk_compile.exporting.weights import locations, share_weights
from hawk_compile.tools.cli import app
from hawk_compile.tools.demo.scenes import make_scene
from tests.exporting import demo

FORMATS = ("onnx",)
exports: dict[str, Path] = {}
printed: dict[str, str] = {}


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> hawk_compile.Runner:
    """The model exported on the command line, from a prompt of one image, once for all tests of a format."""
    name = request.param if hasattr(request, "param") else request.getfixturevalue("name")
    if name not in exports:
        folder = tmp_path_factory.mktemp("export") / name
        called = command("export", demo.FOLDER, folder, "--format", name, "--ratio", 0.8, "--check")
        assert called.exit_code == 0, called.output
        exports[name], printed[name] = folder, called.stdout
    return hawk_compile.load(exports[name])


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_kept_tokens_are_those_of_pytorch(name: str, exported: hawk_compile.Runner) -> None:
    """Six image sizes, one to four rows, one to three images in a row."""
    one, two, three, four, five, six = demo.SIZES
    prompts = [
        *(demo.batch([size], seed=30 + number) for number, size in enumerate(demo.SIZES)),
        demo.batch([two], [six]),
        demo.batch([one], [three, four], [five], [six, one, two]),
    ]
    found = compare(exported, demo.model(), prompts, max_new_tokens=4)
    assert found.whole and found.rows == 12, found
    assert found.logits < 1e-4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.95])
def test_the_budget_is_an_input(name: str, exported: hawk_compile.Runner, ratio: float) -> None:
    """One file answers as the model optimised at each ratio."""
    found = compare(exported, demo.model(), [demo.batch([demo.SIZES[2]], [demo.SIZES[5], demo.SIZES[0]])], ratio=ratio)
    assert found.whole and found.logits < 1e-4, found
    assert exported.report().kept_visual_tokens.tolist() == [
        hawk_compile.HawkConfig(ratio=ratio).kept(count) for count in exported.report().visual_tokens.tolist()
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_generate_is_that_of_transformers(name: str, exported: hawk_compile.Runner) -> None:
    """Beams, sampling, a prompt of text alone, and a second turn of text on the cache of the first."""
    model = hawk_compile.optimize(demo.model(), ratio=0.8, backend="eager")
    picture, text = demo.batch([demo.SIZES[3]]), demo.question()
    for inputs, settings in (
        (picture, {"num_beams": 3, "do_sample": False}),
        (picture, {"do_sample": True, "temperature": 1.5}),
        (text, {"do_sample": False}),
    ):
        torch.manual_seed(0)
        expected = model.generate(**inputs, max_new_tokens=5, **settings)
        torch.manual_seed(0)
        assert exported.generate(**inputs, max_new_tokens=5, **settings).equal(expected)
    assert exported.report().reason == "the prompt has no visual features"
    turns = []
    for generate in (model.generate, exported.generate):
        first: Any = generate(**picture, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, text["input_ids"]], 1)
        turns.append(generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                              past_key_values=first.past_key_values))  # fmt: skip
    assert turns[0].equal(turns[1])


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_the_onnx_graph_is_portable(exported: hawk_compile.Runner) -> None:
    """It passes the checker with full shape inference, and holds nothing that depends on data for its shape."""
    import onnx

    folder = exports["onnx"]
    for part in exported.manifest.parts.values():
        onnx.checker.check_model(str(folder / part.file), full_check=True)
        graph = onnx.load(folder / part.file, load_external_data=False).graph
        used = {node.op_type for node in graph.node}
        assert not used & {"NonZero", "Loop", "If", "Scan", "SequenceAt", "Unique", "Compress"}, part.name
        assert all(node.domain in ("", "ai.onnx") for node in graph.node), part.name
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Einsum" and attribute.name == "equation":
                    assert attribute.s.decode() == attribute.s.decode().lower()
        assert [each.name for each in graph.input] == [each.name for each in part.inputs]
        assert [each.name for each in graph.output] == [each.name for each in part.outputs]
        for value, spec in zip(graph.input, part.inputs, strict=True):
            sizes = [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
            symbolic = [[isinstance(size, str) for size in shape] for shape in (sizes, spec.shape)]
            assert symbolic[0] == symbolic[1], value.name


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_prefill_and_decode_share_their_weights(exported: hawk_compile.Runner) -> None:
    """What both hold lies on disk once: most of the decode step's weights are read from the prefill's file."""
    folder, decode = exports["onnx"], exported.manifest.parts["decode"]
    assert "prefill.onnx.data" in decode.sha256
    own = (folder / "decode.onnx.data").stat().st_size
    assert own < 0.1 * (folder / "prefill.onnx.data").stat().st_size


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_command_line_prints(name: str, exported: hawk_compile.Runner, tmp_path: Path) -> None:
    """Sizes, times and the check of an export; the answer of a run, and what it kept."""
    lines = printed[name].splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["visual", "prefill", "decode"]
    assert lines[4].startswith("check: 3 of 3 prompts have the ids of PyTorch, 3 its kept tokens;")
    scene = make_scene("test", 5, (336, 364))
    scene.pil().save(tmp_path / "scene.png")
    asked = scene.questions[0]
    called = command("run", exports[name], asked.text, "--image", tmp_path / "scene.png", "--ratio", 0.5)
    assert called.exit_code == 0, called.output
    answer, facts = called.stdout.strip().splitlines()
    assert answer == asked.answer and "ratio=0.5 removes 78 of 156 visual tokens" in facts
    unread = command("run", exports[name], asked.text, "--image", tmp_path / "none.png")
    assert unread.exit_code == 2 and unread.stderr.startswith("error: image must be a picture")


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_says_what_was_exported(name: str, exported: hawk_compile.Runner) -> None:
    manifest = exported.manifest
    assert (manifest.format, manifest.ratio, manifest.selector, manifest.dtype) == (name, 0.8, "hawk", "float32")
    assert list(manifest.parts) == ["visual", "prefill", "decode"] and manifest.encoders == ["visual"]
    assert len(manifest.head_weights) == demo.model().config.get_text_config().num_attention_heads
    assert "beside the checkpoint" in manifest.head_weights_origin
    prefill = {each.name: each.shape for each in manifest.parts["prefill"].inputs}
    assert prefill["input_ids"] == ["batch", "prompt"] and prefill["budget"] == ["batch"]
    assert prefill["position_ids"] == [3, "batch", "prompt"] and prefill["kept_slots"] == ["kept"]
    text = json.loads((exports[name] / "manifest.json").read_text())
    assert text["versions"]["torch"].startswith("2.")
    assert {"config.json", "generation_config.json"} <= set(text["files"])


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_int8_weights(exported: hawk_compile.Runner, tmp_path: Path) -> None:
    """A third of the decoder's bytes; the answers of most prompts stay."""
    folder = tmp_path / "int8"
    shutil.copytree(exports["onnx"], folder)
    parts = dict(exported.manifest.parts)
    for name in ("decode", "prefill"):  # decode first: it reads the prefill's weights
        quantize(folder / f"{name}.onnx")
    share_weights(folder / "prefill.onnx", folder / "decode.onnx")
    for name in ("prefill", "decode"):
        files = [f"{name}.onnx", *locations(folder / f"{name}.onnx")]
        parts[name] = replace(parts[name], sha256={file: file_digest(folder / file) for file in files})
    manifest = replace(exported.manifest, parts=parts)
    manifest.write(folder)
    runner = hawk_compile.load(folder)
    pairs = zip(demo.SIZES, demo.SIZES[1:], strict=False)
    prompts = [demo.batch([left], [right], seed=70 + number) for number, (left, right) in enumerate(pairs)]
    found = compare(runner, demo.model(), prompts, max_new_tokens=1)
    assert found.same_ids >= 0.9 * found.rows, found
    held = sum((folder / name).stat().st_size for name in manifest.parts["decode"].sha256 if name.endswith(".data"))
    parameters = sum(each.numel() for name, each in demo.model().named_parameters() if "visual" not in name)
    assert held < 4 * parameters / 3
