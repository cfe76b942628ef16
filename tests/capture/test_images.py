"""What of the features of a call is one image, of encoders that hand them on in all kinds of ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.images import frames_in, image_sizes, images_apart
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.tools.survey.tiny import build, prompt
from tests.tiny import tiny

PER_ROW = ("idefics2", "idefics3", "smolvlm")


def encoded(name: str, **others: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(model, the prompt of two rows, what its encoders gave)."""
    model, inputs = build(tiny(name)), prompt(tiny(name), 2) | others
    with torch.no_grad():
        return model, inputs, run_encoders(model, dict(inputs))["mm_encoder_outputs"]


@pytest.mark.parametrize("name", PER_ROW)
def test_tiles_that_a_row_has_as_one_are_taken_apart(name: str) -> None:
    """Two in each row, of four tokens; and a row that is without one, which is padded with zeros."""
    model, inputs, outputs = encoded(name)
    apart = images_apart(model, outputs, None)
    assert image_sizes(model, apart) == {"image": [4, 4, 4, 4]}
    joined = torch.cat(list(outputs["image"].pooler_output))
    assert torch.cat(list(apart["image"].pooler_output)).equal(joined)
    again = images_apart(model, apart, None)
    assert image_sizes(model, again) == {"image": [4, 4, 4, 4]}
    pixels = inputs["pixel_values"].clone()
    pixels[1] = 0
    model, _, outputs = encoded(name, pixel_values=pixels)
    assert image_sizes(model, images_apart(model, outputs, None)) == {"image": [4, 4]}


@pytest.mark.parametrize(("name", "sizes"), [
    ("llava_next", [10, 10]), ("internvl", [64, 64]),
    pytest.param("molmo2", [32, 32], marks=pytest.mark.skipif(
        not hasattr(transformers, "Molmo2Config"), reason="this release of transformers has no Molmo 2")),
])  # fmt: skip
def test_what_an_encoder_puts_together_itself_stays_one(name: str, sizes: list[int]) -> None:
    """Of LLaVA-NeXT a picture with its two tiles, each of five hidden states; of others what they have an entry for."""
    model, _, outputs = encoded(name)
    assert image_sizes(model, images_apart(model, outputs, None)) == {"image": sizes}


def test_frames_that_a_video_has_as_one_are_taken_apart() -> None:
    """Four in each video, of ten tokens."""
    model, _, outputs = encoded("instructblipvideo")
    apart = images_apart(model, outputs, None)
    assert image_sizes(model, apart) == {"video": [10] * 8}
    assert apart["video"].pooler_output.flatten(0, 1).equal(outputs["video"].pooler_output.flatten(0, 1))


@pytest.mark.parametrize(("config", "size", "grid", "frames"), [
    ({"spatial_merge_size": 2}, 48, (2, 8, 12), 2),
    ({"spatial_merge_size": 1}, 64, (2, 8, 8), 1),  # two frames that are merged into one
    ({"spatial_merge_size": 1}, 128, (4, 8, 8), 2),
    ({"merge_kernel_size": [2, 2]}, 16, (4, 8, 8), 1),  # which are as many as frames merged four by four would be
    ({}, 48, (2, 8, 12), 2),
    ({}, 50, (2, 8, 12), 1),
    ({"spatial_merge_size": 2}, 50, (2, 8, 12), 1),
])  # fmt: skip
def test_frames_that_an_encoder_hands_on(config: dict[str, Any], size: int, grid: tuple[int, ...], frames: int) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(**config)))
    assert frames_in(model, size, grid) == frames


@pytest.mark.parametrize(("name", "what"), [
    ("inkling_mm_model", "24 features of images, each by itself"),
    ("phi4_multimodal.long_rope", "images merged in the middle of its forward"),
])  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(name: str, what: str) -> None:
    model = hawk_compile.optimize(build(tiny(name)), ratio=0.5, min_per_image=1, backend="eager")
    with pytest.raises(UnsupportedCallError, match=f"are of images, and {type(model).__name__} hands on .*{what}"):
        model(**prompt(tiny(name), 2))
