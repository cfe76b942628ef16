"""Prefill and decode of a tiny model in formats that take longer to write, component by component.

`benchmarks/export.py agreement --formats aoti openvino` runs the whole shipped model in them.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hawk_compile
from hawk_compile.exporting import write
from hawk_compile.exporting.components import KEY, PAST_KEY, PAST_VALUE, VALUE, Component
from hawk_compile.exporting.manifest import Part
from hawk_compile.head_weights import resolve
from tests import zoo

NAME = "qwen2_5_vl"
CONFIG = hawk_compile.HawkConfig(ratio=0.6)
WEIGHTS = {"aoti": ".safetensors", "openvino": ".bin"}
"""Where each format puts weights."""

scratch = tempfile.TemporaryDirectory(prefix="hawk-decoders-")


@functools.cache
def model() -> Any:
    return zoo.build(NAME, layers=1)


def prompt(*rows: zoo.Row) -> dict[str, Any]:
    return zoo.inputs(NAME, model(), rows=list(rows))


def prefill(*rows: zoo.Row) -> Component:
    """The prefill as it is before the passes; its sample has all rows twice."""
    return write.prefill_component(model(), prompt(*rows), CONFIG, resolve("auto", model()).values)


@functools.cache
def written(format: str) -> tuple[Path, dict[str, Part], Component]:
    """Both components, written from a prompt of one image, and the decode step in PyTorch."""
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    folder = Path(scratch.name) / format
    folder.mkdir()
    pruned = write.prune(prefill(zoo.sizes(NAME)[1]), CONFIG, portable=format != "aoti")
    decode = write.decode_component(model(), pruned)
    return folder, {each.name: write.write_part(target, each, folder, None) for each in (pruned, decode)}, decode


@functools.cache
def session(format: str, name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    folder, parts, _ = written(format)
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    return target.open_session(folder, parts[name].file, parts[name])


@pytest.mark.parametrize("format", WEIGHTS)
def test_prefill_and_decode_answer_as_pytorch(format: str) -> None:
    """Other image sizes, several images and rows than at export; and a step behind them."""
    sizes, decode = zoo.sizes(NAME), written(format)[2].module
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for rows in ([sizes[2]], [sizes[3], sizes[6]]):
        found = session(format, "prefill")(prefill(*rows).sample)
        optimized = hawk_compile.optimize(model(), ratio=CONFIG.ratio, backend="eager")
        expected = optimized.generate(**prompt(*rows), **settings).logits[0]
        torch.testing.assert_close(found["logits"], torch.cat([expected, expected]), atol=1e-5, rtol=1e-5)
        kept = hawk_compile.report(optimized).keep_indices
        hawk_compile.restore(optimized)
        for row, wanted in enumerate([*kept, *kept]):
            assert found["keep"][row][found["valid"][row].bool()].equal(wanted)
        step = behind(found)
        with torch.no_grad():
            torch.testing.assert_close(session(format, "decode")(step)["logits"], decode(**step)["logits"])


def behind(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the step after a prefill: its likeliest token, at some position behind."""
    ids = found["logits"].argmax(-1, keepdim=True)
    mask = torch.cat([found["valid"].to(torch.int64), torch.ones_like(ids)], 1)
    past = {PAST_KEY.format(0): found[KEY.format(0)], PAST_VALUE.format(0): found[VALUE.format(0)]}
    past = {name: value.contiguous() for name, value in past.items()}
    positions = torch.full_like(ids, 99).expand(3, *ids.shape).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


@pytest.mark.parametrize("format", WEIGHTS)
def test_prefill_and_decode_share_their_weights(format: str) -> None:
    """What both hold lies on disk once."""
    folder, parts, _ = written(format)
    assert "prefill" + WEIGHTS[format] in parts["decode"].sha256
    held = sum(file.stat().st_size for file in folder.glob(f"*{WEIGHTS[format]}"))
    decoder = sum(each.numel() for name, each in model().named_parameters() if "visual" not in name)
    assert held < 1.1 * 4 * decoder


def test_compiled_code_shares_them_in_memory() -> None:
    from hawk_compile.exporting import aoti

    both = [session("aoti", name) for name in ("prefill", "decode")]
    assert both and len(aoti.opened) == 1


def test_compiled_code_needs_no_python_of_the_model(tmp_path: Path) -> None:
    """A process that imports torch and safetensors alone runs it."""
    folder, feed = written("aoti")[0], prefill(zoo.sizes(NAME)[4]).sample
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
