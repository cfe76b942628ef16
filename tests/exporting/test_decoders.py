"""Prefill and decode of tiny models in formats that take longer to write, component by component.

`benchmarks/export.py agreement --formats aoti openvino` runs the whole shipped model in them, and `benchmarks/export.py
architectures` tiny ones of six architectures.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hawk_compile
from hawk_compile.exporting import aoti
from hawk_compile.exporting.caches import KEY, PAST, VALUE
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.decode import decode_component
from hawk_compile.exporting.manifest import Part
from hawk_compile.exporting.parts import write_part
from hawk_compile.exporting.prefill import prefill_component, prune
from hawk_compile.settings.head_weights import resolve
from tests import zoo

NAMES = {"aoti": "qwen2_5_vl", "openvino": "qwen3_vl"}
LAYERS = {"aoti": 1, "openvino": 2}
"""Compiling takes its time; features for later layers want two."""
CONFIG = hawk_compile.HawkConfig(ratio=0.6)
scratch = tempfile.TemporaryDirectory(prefix="hawk-decoders-")


@functools.cache
def model(format: str) -> Any:
    return zoo.build(NAMES[format], layers=LAYERS[format])


def prompt(format: str, *rows: zoo.Row) -> dict[str, Any]:
    return zoo.inputs(NAMES[format], model(format), rows=list(rows))


def prefill(format: str, *rows: zoo.Row) -> Component:
    """The prefill as it is before the passes; its sample has all rows twice."""
    return prefill_component(model(format), prompt(format, *rows), CONFIG, resolve("auto", model(format)).values)


@functools.cache
def written(format: str) -> tuple[Path, dict[str, Part], Component]:
    """The prefill, written from a prompt of one image, and, but for compiled ones, decode; decode in PyTorch."""
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    folder = Path(scratch.name) / format
    folder.mkdir()
    pruned = prune(prefill(format, zoo.sizes(NAMES[format])[1]), CONFIG, portable=format != "aoti")
    decode = decode_component(model(format), pruned)
    components = (pruned,) if format == "aoti" else (pruned, decode)
    return folder, {each.name: write_part(target, each, folder, None) for each in components}, decode


@functools.cache
def session(format: str, name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    folder, parts, _ = written(format)
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    return target.open_session(folder, parts[name].file, parts[name])


@pytest.mark.slow
@pytest.mark.parametrize("format", NAMES)
def test_prefill_and_decode_answer_as_pytorch(format: str) -> None:
    """Other image sizes, several images and rows than at export; and a step behind them."""
    sizes, decode = zoo.sizes(NAMES[format]), written(format)[2].module
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for rows in ([sizes[2]], [sizes[3], sizes[6]]):
        found = session(format, "prefill")(prefill(format, *rows).sample)
        optimized = hawk_compile.optimize(model(format), ratio=CONFIG.ratio, backend="eager")
        expected = optimized.generate(**prompt(format, *rows), **settings).logits[0]
        torch.testing.assert_close(found["logits"], torch.cat([expected, expected]), atol=1e-5, rtol=1e-5)
        kept = hawk_compile.report(optimized).keep_indices
        hawk_compile.restore(optimized)
        for row, wanted in enumerate([*kept, *kept]):
            assert found["keep"][row][found["valid"][row].bool()].equal(wanted)
        if "decode" in written(format)[1]:
            step = behind(found, LAYERS[format])
            with torch.no_grad():
                torch.testing.assert_close(session(format, "decode")(step)["logits"], decode(**step)["logits"])


def behind(found: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inputs of the step after a prefill: its likeliest token, at some position behind."""
    ids = found["logits"].argmax(-1, keepdim=True)
    mask = torch.cat([found["valid"].to(torch.int64), torch.ones_like(ids)], 1)
    past = {
        PAST + form.format(layer): found[form.format(layer)].contiguous()
        for layer in range(layers)
        for form in (KEY, VALUE)
    }
    positions = torch.full_like(ids, 99).expand(3, *ids.shape).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


@pytest.mark.slow
def test_openvino_graphs_share_their_weights() -> None:
    """What both hold lies on disk once."""
    folder, parts, _ = written("openvino")
    assert list(parts["decode"].sha256) == ["decode.xml", "prefill.bin"]
    decoder = sum(each.numel() for name, each in model("openvino").named_parameters() if "visual" not in name)
    assert sum(file.stat().st_size for file in folder.glob("*.bin")) < 1.1 * 4 * decoder


@pytest.mark.slow
def test_an_openvino_session_serves_threads_side_by_side() -> None:
    """Each with a request of its own: one that two threads shared would be busy."""
    name, met = NAMES["openvino"], threading.Barrier(2, timeout=60)
    feeds = [prefill("openvino", zoo.sizes(name)[number]).sample for number in (1, 3)]
    alone = [session("openvino", "prefill")(feed)["logits"] for feed in feeds]

    def ask(number: int) -> None:
        for _ in range(20):
            met.wait()
            assert session("openvino", "prefill")(feeds[number])["logits"].equal(alone[number])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, range(2)))


def test_compiled_code_shares_its_weights(tmp_path: Path) -> None:
    """What the prefill's file holds is named there, and the rest written; shapes and dtypes tell equal bytes apart."""
    shared, zeros = torch.randn(3, 2), torch.zeros(4)
    first = aoti.save_weights({"a.weight": shared, "a.bias": zeros}, tmp_path, "prefill")
    assert first == {"prefill.safetensors": {"a.weight": "a.weight", "a.bias": "a.bias"}}
    own = {"weight": shared.clone(), "flat": shared.reshape(6), "number": zeros.to(torch.int32)}
    second = aoti.save_weights(own, tmp_path, "decode")
    assert second == {
        "prefill.safetensors": {"weight": "a.weight"},
        "decode.safetensors": {"flat": "flat", "number": "number"},
    }
    held = load_file(tmp_path / "decode.safetensors")
    assert held["flat"].equal(shared.reshape(6)) and held["number"].dtype == torch.int32


@pytest.mark.slow
def test_compiled_code_needs_no_python_of_the_model(tmp_path: Path) -> None:
    """A process that imports torch and safetensors alone runs it."""
    folder, feed = written("aoti")[0], prefill("aoti", zoo.sizes(NAMES["aoti"])[4]).sample
    found = session("aoti", "prefill")(feed)
    save_file({name: value.contiguous() for name, value in feed.items()}, tmp_path / "feed.safetensors")
    save_file({name: found[name].contiguous() for name in ("logits", "keep")}, tmp_path / "out.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file; here, folder = sys.argv[1:];"
        "feed, out = load_file(here + '/feed.safetensors'), load_file(here + '/out.safetensors');"
        "prefill = torch._inductor.aoti_load_package(folder + '/prefill.pt2');"
        "weights = load_file(folder + '/prefill.safetensors');"
        "prefill.load_constants(weights, check_full_update=True, user_managed=True);"
        "got = prefill(**feed);"
        "assert torch.equal(got['keep'], out['keep']); assert torch.equal(got['logits'], out['logits']);"
        "assert not {'transformers', 'hawk_compile'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, folder], check=True, cwd=tmp_path)
