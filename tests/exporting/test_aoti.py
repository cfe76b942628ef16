"""AOTInductor packages, of a prefill; `benchmarks/export.py agreement --formats aoti` compiles the whole model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hawk_compile
from hawk_compile.exporting import aoti, write
from hawk_compile.exporting.components import Component
from hawk_compile.head_weights import resolve
from tests.exporting import demo

RATIO = 0.8
CONFIG = hawk_compile.HawkConfig(ratio=RATIO)


def prefill(*rows: list[tuple[int, int]]) -> Component:
    """The shipped model's prefill as it is before the passes, with all rows twice for a sample."""
    weights = resolve("auto", demo.model()).values
    return write.prefill_component(demo.model(), demo.batch(*rows), CONFIG, weights)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti")
    pruned = write.prune(prefill([demo.SIZES[1]]), CONFIG, portable=False)
    assert aoti.write(pruned, folder, None) == (["prefill.pt2"], {})
    return folder


def run_alone(folder: Path, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    return aoti.open_session(folder, "prefill.pt2", None)(feed)


def test_the_prefill_answers_as_pytorch(package: Path) -> None:
    """Other image sizes, several images and rows than at export."""
    model = hawk_compile.optimize(demo.model(), ratio=RATIO, backend="eager")
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for rows in ([[demo.SIZES[4]]], [[demo.SIZES[0], demo.SIZES[3]], [demo.SIZES[2]]]):
        found = run_alone(package, prefill(*rows).sample)
        hawk_compile.optimize(model, ratio=RATIO, backend="eager")
        expected = model.generate(**demo.batch(*rows), **settings).logits[0]
        torch.testing.assert_close(found["logits"], torch.cat([expected, expected]), atol=1e-4, rtol=1e-4)
        kept = hawk_compile.report(model).keep_indices
        for row, wanted in enumerate([*kept, *kept]):
            assert found["keep"][row][found["valid"][row].bool()].equal(wanted)


def test_it_needs_no_python_of_the_model(package: Path, tmp_path: Path) -> None:
    """A process that imports torch alone runs it."""
    feed = prefill([demo.SIZES[4]]).sample
    found = run_alone(package, feed)
    save_file({name: value.contiguous() for name, value in feed.items()}, tmp_path / "feed.safetensors")
    save_file({name: found[name].contiguous() for name in ("logits", "keep")}, tmp_path / "out.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file; folder, prefill = sys.argv[1:];"
        "feed, out = load_file(folder + '/feed.safetensors'), load_file(folder + '/out.safetensors');"
        "got = torch._inductor.aoti_load_package(prefill)(**feed);"
        "assert torch.equal(got['keep'], out['keep']); assert torch.equal(got['logits'], out['logits']);"
        "assert not {'transformers', 'hawk_compile'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, package / "prefill.pt2"], check=True, cwd=tmp_path)
