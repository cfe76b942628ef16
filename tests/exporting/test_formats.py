"""The shipped model in ONNX, held to the optimised model in PyTorch: cut to few layers, and whole in the slow tests.

`benchmarks/export.py agreement` does the same for every format.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner, Result

import hawk_compile
from hawk_compile.exporting.check import compare
from hawk_compile.exporting.manifest import file_digest
from hawk_compile.exporting.quantize import quantize
from hawk_compile.exporting.weights import locations, share_weights
from hawk_compile.tools.cli import app
from hawk_compile.tools.demo.scenes import make_scene
from tests.exporting import demo


class Exported(NamedTuple):
    """A checkpoint, what it was exported to, and what the command line printed of that."""

    checkpoint: Path
    folder: Path
    printed: str
    runner: hawk_compile.Runner
    model: Any

    @property
    def whole(self) -> bool:
        return self.checkpoint == Path(demo.FOLDER)


@pytest.fixture(scope="module", params=["cut", pytest.param("whole", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """Exported on the command line, from a prompt of one image: a layer of each kind, or the whole model."""
    path = tmp_path_factory.mktemp(request.param)
    checkpoint, folder = Path(demo.FOLDER), path / "onnx"
    if request.param == "cut":
        checkpoint = path / "checkpoint"
        demo.save_cut(checkpoint)
    called = command("export", checkpoint, folder, "--format", "onnx", "--ratio", 0.8, "--check")
    assert called.exit_code == 0, called.output
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32").eval()
    yield Exported(checkpoint, folder, called.stdout, hawk_compile.load(folder), model)
    shutil.rmtree(path)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_ids_and_kept_tokens_are_those_of_pytorch(exported: Exported) -> None:
    """Six image sizes, one to four rows, one to three images in a row."""
    one, two, three, four, five, six = demo.SIZES
    prompts = [
        *(demo.batch([size], seed=30 + number) for number, size in enumerate(demo.SIZES)),
        demo.batch([two], [six]),
        demo.batch([one], [three, four], [five], [six, one, two]),
    ]
    found = compare(exported.runner, exported.model, prompts, max_new_tokens=4)
    assert found.whole and found.rows == 12, found
    assert found.logits < 1e-4


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.95])
def test_the_budget_is_an_input(exported: Exported, ratio: float) -> None:
    """One file answers as the model optimised at each ratio."""
    rows = demo.batch([demo.SIZES[2]], [demo.SIZES[5], demo.SIZES[0]])
    found = compare(exported.runner, exported.model, [rows], ratio=ratio)
    assert found.whole and found.logits < 1e-4, found
    assert exported.runner.report().kept_visual_tokens.tolist() == [
        hawk_compile.HawkConfig(ratio=ratio).kept(count) for count in exported.runner.report().visual_tokens.tolist()
    ]


def test_generate_is_that_of_transformers(exported: Exported) -> None:
    """Beams, sampling, a prompt of text alone, and a second turn of text on the cache of the first."""
    model = hawk_compile.optimize(exported.model, ratio=0.8, backend="eager")
    picture, text = demo.batch([demo.SIZES[3]]), demo.question()
    for inputs, settings in (
        (picture, {"num_beams": 3, "do_sample": False}),
        (picture, {"do_sample": True, "temperature": 1.5}),
        (text, {"do_sample": False}),
    ):
        torch.manual_seed(0)
        expected = model.generate(**inputs, max_new_tokens=5, **settings)
        torch.manual_seed(0)
        assert exported.runner.generate(**inputs, max_new_tokens=5, **settings).equal(expected)
    assert exported.runner.report().reason == "the prompt has no visual features"
    turns = []
    for generate in (model.generate, exported.runner.generate):
        first: Any = generate(**picture, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, text["input_ids"]], 1)
        turns.append(generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
                              past_key_values=first.past_key_values))  # fmt: skip
    assert turns[0].equal(turns[1])


def test_the_onnx_graph_is_portable(exported: Exported) -> None:
    """It passes the checker with full shape inference, and holds nothing that depends on data for its shape."""
    import onnx

    folder = exported.folder
    for part in exported.runner.manifest.parts.values():
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


def test_prefill_and_decode_share_their_weights(exported: Exported) -> None:
    """What both hold lies on disk once: most of the decode step's weights are read from the prefill's file."""
    folder, decode = exported.folder, exported.runner.manifest.parts["decode"]
    assert "prefill.onnx.data" in decode.sha256
    own = (folder / "decode.onnx.data").stat().st_size
    assert own < (0.1 if exported.whole else 0.15) * (folder / "prefill.onnx.data").stat().st_size


def test_what_the_command_line_prints(exported: Exported, tmp_path: Path) -> None:
    """Sizes, times and the check of an export; the answer of a run, and what it kept."""
    lines = exported.printed.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["visual", "prefill", "decode"]
    assert lines[4].startswith("check: 3 of 3 prompts have the ids of PyTorch, 3 its kept tokens;")
    scene = make_scene("test", 5, (336, 364))
    scene.pil().save(tmp_path / "scene.png")
    asked = scene.questions[0]
    called = command("run", exported.folder, asked.text, "--image", tmp_path / "scene.png", "--ratio", 0.5,
                     "--tokens", 8)  # fmt: skip
    assert called.exit_code == 0, called.output
    answer, facts = called.stdout.strip().splitlines()
    assert answer == demo.answer(hawk_compile.optimize(exported.model, ratio=0.5, backend="eager"), scene, asked.text)
    assert not exported.whole or answer == asked.answer
    assert "ratio=0.5 removes 78 of 156 visual tokens" in facts
    blind = command("run", exported.folder, "What is this?", "--tokens", 8)
    assert blind.exit_code == 0 and "no --image was given" in blind.stderr
    assert "the prompt has no visual features" in blind.stdout
    unread = command("run", exported.folder, asked.text, "--image", tmp_path / "none.png")
    assert unread.exit_code == 2 and unread.stderr.startswith("error: --image: there is no image")


def test_the_manifest_says_what_was_exported(exported: Exported) -> None:
    manifest = exported.runner.manifest
    assert (manifest.format, manifest.ratio, manifest.selector, manifest.dtype) == ("onnx", 0.8, "hawk", "float32")
    assert list(manifest.parts) == ["visual", "prefill", "decode"] and manifest.encoders == ["visual"]
    assert len(manifest.head_weights) == exported.model.config.get_text_config().num_attention_heads
    assert "beside the checkpoint" in manifest.head_weights_origin
    prefill = {each.name: each.shape for each in manifest.parts["prefill"].inputs}
    assert prefill["input_ids"] == ["batch", "prompt"] and prefill["budget"] == ["batch"]
    assert prefill["position_ids"] == [3, "batch", "prompt"] and prefill["kept_slots"] == ["kept"]
    text = json.loads((exported.folder / "manifest.json").read_text())
    assert text["versions"]["torch"].startswith("2.")
    assert {"config.json", "generation_config.json"} <= set(text["files"])


def test_int8_weights(exported: Exported, tmp_path: Path) -> None:
    """A third of the decoder's bytes, or a little more of one layer's, since the first one's query and key, in which it
    scores, stay in float32 beside their int8; the answers of most prompts stay."""
    folder = tmp_path / "int8"
    shutil.copytree(exported.folder, folder)
    parts = dict(exported.runner.manifest.parts)
    for name in ("decode", "prefill"):  # decode first: it reads the prefill's weights
        quantize(folder / f"{name}.onnx")
    share_weights(folder / "prefill.onnx", folder / "decode.onnx")
    for name in ("prefill", "decode"):
        files = [f"{name}.onnx", *locations(folder / f"{name}.onnx")]
        parts[name] = replace(parts[name], sha256={file: file_digest(folder / file) for file in files})
    manifest = replace(exported.runner.manifest, parts=parts)
    manifest.write(folder)
    runner = hawk_compile.load(folder)
    pairs = zip(demo.SIZES, demo.SIZES[1:], strict=False)
    prompts = [demo.batch([left], [right], seed=70 + number) for number, (left, right) in enumerate(pairs)]
    found = compare(runner, exported.model, prompts, max_new_tokens=1)
    assert found.same_ids >= 0.9 * found.rows, found
    held = sum((folder / name).stat().st_size for name in manifest.parts["decode"].sha256 if name.endswith(".data"))
    parameters = sum(each.numel() for name, each in exported.model.named_parameters() if "visual" not in name)
    assert held < 4 * parameters * (1 / 3 if exported.whole else 0.42)
