"""A few operators in the formats that take long to write: sizes other than at export, and weights that are shared."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.errors import InputError
from hawk_compile.exporting import openvino
from hawk_compile.exporting.components import DECODE, PREFILL, Component
from hawk_compile.exporting.parts import write_part
from tests.marks import slow

WIDTH = 64
SIZES = {"prompt": (2, 8, 16), "new": (2, 8, 16), "batch": (1, 2, 3)}


class Products(nn.Module):
    """Hidden states [B, S, D], through `shared` and a convolution of patches that are D / 4 channels of 2 x 2."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Conv3d(WIDTH // 4, WIDTH, (1, 2, 2))

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        patches = self.own(hidden.reshape(-1, WIDTH // 4, 1, 2, 2))
        return {"product": self.shared(hidden), "patches": patches.reshape(hidden.shape)}


def parts() -> list[Component]:
    """Two, with one weight in both."""
    torch.manual_seed(0)
    shared, sample = nn.Linear(WIDTH, WIDTH), {"hidden": torch.randn(2, 5, WIDTH)}
    return [
        Component(name, Products(shared).eval(), sample, {"hidden": ("batch", length, WIDTH)})
        for name, length in ((PREFILL, "prompt"), (DECODE, "new"))
    ]


@pytest.mark.parametrize("format", [*slow("aoti"), "openvino", "executorch"])
def test_parts_answer_as_pytorch(format: str, tmp_path: Path) -> None:
    target: Any = importlib.import_module(f"hawk_compile.exporting.{format}")
    options = target.options({"sizes": SIZES}) if hasattr(target, "options") else None
    components = parts()[: 1 if format == "aoti" else 2]  # each is compiled by a C++ compiler, which takes its time
    written = {each.name: write_part(target, each, tmp_path, options) for each in components}
    for component in components:
        part = written[component.name]
        session = target.open_session(tmp_path, part.file, part)
        for shape in ((2, 5), (3, 16), (1, 2)):
            hidden = torch.randn(*shape, WIDTH)
            found, expected = session({"hidden": hidden}), component.module(hidden)
            assert found.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    if format == "executorch":
        with pytest.raises(InputError, match=r"was built for 2 to 16: .* export again with sizes="):
            session({"hidden": torch.randn(1, 17, WIDTH)})
    if format == "openvino":
        assert any(file.startswith(PREFILL) for file in written[DECODE].sha256)
        held = sum(file.stat().st_size for file in tmp_path.iterdir() if file.suffix in (".bin", ".safetensors"))
        assert held < 1.1 * 4 * WIDTH * (3 * WIDTH + 3)


def test_an_openvino_session_serves_threads_side_by_side(tmp_path: Path) -> None:
    """With inputs that keep a request busy for a while: one that two threads shared would refuse the second."""
    part = write_part(openvino, parts()[0], tmp_path, None)
    session, met = openvino.open_session(tmp_path, part.file, part), threading.Barrier(2, timeout=60)
    feeds = [{"hidden": torch.randn(32, 512, WIDTH)} for _ in range(2)]
    alone = [session(feed)["product"] for feed in feeds]

    def ask(number: int) -> None:
        for _ in range(5):
            met.wait()
            assert session(feeds[number])["product"].equal(alone[number])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, range(2)))
