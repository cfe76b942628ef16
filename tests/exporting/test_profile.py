"""The ranges of sizes that an engine is built for: from those that were named, or by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hawk_compile.errors import ConfigError
from hawk_compile.exporting import profile, tensorrt
from hawk_compile.exporting.components import Component

LONG = {"batch": (1, 1, 2), "prompt": (64, 256, 4096), "visual": (64, 160, 4096), "images": (1, 1, 2)}


def sample(shapes: dict[str, tuple[str | int, ...]], sizes: dict[str, int], **settings: Any) -> Component:
    tensors = {
        name: torch.zeros([size if isinstance(size, int) else sizes[size] for size in shape])
        for name, shape in shapes.items()
    }
    return Component("part", nn.Identity(), tensors, shapes, **settings)


PROMPT = sample(
    {"input_ids": ("batch", "prompt"), "features": ("visual", 8)},
    {"batch": 2, "prompt": 20, "visual": 24},
    least={"visual": 2},
)


def test_sizes_of_an_encoder_follow_from_those_given() -> None:
    """Of one image of 24 x 26 patches, in 12 windows."""
    sizes = {
        "patches": 624, "merged_patches": 156, "segments": 1, "longest_segment": 624, "windows": 12,
        "longest_window": 64,
    }  # fmt: skip
    component = sample({name: (name,) for name in sizes}, sizes, visual=156)
    assert profile.ranges(component, LONG) == {
        "patches": (256, 640, 16384), "merged_patches": (64, 160, 4096), "segments": (1, 1, 2),
        "longest_segment": (128, 640, 16384), "windows": (1, 13, 1261), "longest_window": (1, 64, 64),
    }  # fmt: skip


def test_sizes_of_decoder_parts_follow_from_those_given() -> None:
    decode = {"batch": 2, "new": 2, "past": 3, "total": 5}
    assert profile.ranges(sample({name: (name,) for name in decode}, decode), LONG) == {
        "batch": (1, 1, 2), "new": (1, 1, 4096), "past": (0, 256, 8192), "total": (1, 257, 12288),
    }  # fmt: skip
    kept = {"prompt": 20, "visual": 16, "kept": 10, "kept_visual": 4}
    assert profile.ranges(sample({name: (name,) for name in kept}, kept), LONG) == {
        "prompt": LONG["prompt"], "visual": LONG["visual"], "kept": (2, 128, 4096), "kept_visual": (1, 40, 4096),
    }  # fmt: skip


def test_default_sizes() -> None:
    assert profile.ranges(PROMPT, {}) == {"batch": (1, 1, 4), "prompt": (2, 512, 3840), "visual": (2, 384, 3840)}
    given = {"batch": (2, 2, 8), "prompt": (8, 40, 50)}
    assert profile.ranges(PROMPT, given) == {**given, "visual": (2, 60, 100)}


def test_sizes_below_what_a_graph_holds_for() -> None:
    with pytest.raises(ConfigError, match=r'sizes\["visual"\] must be from 2 on for part .*, got \(1, 2, 3\)'):
        profile.ranges(PROMPT, {"visual": (1, 2, 3)})


def test_tiles_follow_visual_tokens() -> None:
    component = sample({"pixel_values": ("tiles", 3, 4, 4)}, {"tiles": 6}, visual=60)
    assert profile.ranges(component, {"visual": (5, 45, 105)}) == {"tiles": (1, 5, 11)}
    assert profile.ranges(component, {"tiles": (1, 2, 3)}) == {"tiles": (1, 2, 3)}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([1, 2, 3], r"sizes must map names of sizes to \(minimum, usual, maximum\), got \[1, 2, 3\]; give for example"),
        ({"width": (1, 2, 3)}, r"sizes names 'width'; the sizes are batch, prompt, visual,"),
        ({"prompt": 512}, r'sizes\["prompt"\] must be three whole numbers, .*, from 2 on, got 512; give for example'),
        ({"prompt": (16, 512)}, r'sizes\["prompt"\] must be three whole numbers'),
        ({"prompt": (16, 512.0, 1024)}, r"got \(16, 512\.0, 1024\)"),
        ({"batch": (True, 2, 3)}, r"got \(True, 2, 3\)"),
        ({"batch": (0, 1, 4)}, r'sizes\["batch"\] .* from 1 on, got \(0, 1, 4\)'),
        ({"visual": (64, 32, 128)}, r"minimum <= usual <= maximum, from 1 on, got \(64, 32, 128\)"),
        ({"past": (0, 512, 256)}, r"minimum <= usual <= maximum, from 0 on, got \(0, 512, 256\)"),
    ],
)
def test_sizes_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensorrt.options({"sizes": sizes})
