"""ExecuTorch programs, held to the optimised model in PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hawk_compile.capture.segments import prepared
from hawk_compile.errors import InputError
from hawk_compile.exporting import executorch, profile
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.exporting.parts import write_part
from tests import zoo

NAME = "qwen2_5_vl"
SIZES = {"prompt": (2, 256, 512), "visual": (2, 200, 512), "images": (1, 1, 6), "batch": (1, 1, 3)}


@pytest.mark.slow
def test_an_encoder_takes_images_of_unequal_sizes(tmp_path: Path) -> None:
    """Exported from one image. Prefill and decode: `benchmarks/export.py agreement --formats executorch`."""
    model, sizes = zoo.build(NAME, layers=1), zoo.sizes(NAME)
    (component,) = encoder_components(model, zoo.inputs(NAME, model, rows=[sizes[1]]))
    tight = executorch.bounded(component, profile.ranges(component, {"images": (1, 1, 1)}))
    assert tight["segments"] == (1, 1, component.sizes["segments"] + 1)  # equal bounds would fix the size
    part = write_part(executorch, component, tmp_path, executorch.options({"sizes": SIZES}))
    session = executorch.open_session(tmp_path, part.file, part)
    for rows in ([sizes[2]], [sizes[3], sizes[6]], [sizes[0], sizes[4], sizes[5]]):
        inputs = zoo.inputs(NAME, model, rows=rows)
        pixels = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
        given = prepared(model.base_model.visual, pixels)
        with torch.no_grad():
            expected = model.base_model.visual(**pixels).pooler_output
        torch.testing.assert_close(session(given)["pooler_output"], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"was built for 2 to 512: .* export again with sizes="):
        session({**given, "window_index": torch.zeros(513, dtype=torch.int64)})


def test_the_largest_value_of_a_size() -> None:
    """Its bound; and where that is infinite, because a divisor might be 0, its value for the largest sizes."""
    size = ShapeEnv().create_unbacked_symint()
    torch._check(size >= 2)
    torch._check(size <= 4096)
    assert executorch.largest(7) == 7
    assert executorch.largest(3 * size) == 3 * 4096
    assert executorch.largest(size // (size // 4)) == 4
