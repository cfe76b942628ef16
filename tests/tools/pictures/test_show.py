"""`hawk-compile show` on the shipped model, and which pictures can be drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hawk_compile
from hawk_compile.errors import InputError
from hawk_compile.tools.cli import app
from hawk_compile.tools.demo.scenes import make_scene
from hawk_compile.tools.dimming import dimmed
from hawk_compile.tools.pictures import commands
from hawk_compile.tools.pictures.seen import Seen
from hawk_compile.tools.pictures.show import grid, show
from tests.exporting import demo

SCENE = make_scene("test", 5, (336, 364))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The command line's call, its arguments, and what was seen on its way."""
    folder, seen = tmp_path_factory.mktemp("show"), []
    SCENE.pil().save(folder / "scene.png")
    arguments = ["show", demo.FOLDER, str(folder / "scene.png"), SCENE.questions[0].text, "--backend", "eager"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "show", lambda *given, **settings: seen.append(show(*given, **settings)) or seen[0])
        called = CliRunner().invoke(app, [*arguments, "--out", str(folder / "show.png")])
    assert called.exit_code == 0, called.output
    return SimpleNamespace(stdout=called.stdout, arguments=arguments, folder=folder, seen=seen[0])


def test_what_is_seen_is_what_the_report_says(shown):
    seen = shown.seen
    assert seen.unpruned == SCENE.questions[0].answer and seen.kept.shape == seen.scores.shape == (12, 13)
    assert seen.kept.sum() == hawk_compile.HawkConfig(ratio=0.8).kept(156)
    assert set(seen.scores[seen.kept]) == set(np.sort(seen.scores.ravel())[-seen.kept.sum() :])
    by_hand = np.tensordot(seen.weights, seen.heads, 1)  # each head's map has length 1
    np.testing.assert_allclose(by_hand, seen.scores, atol=1e-5)


def test_heads_are_those_that_the_selector_used():
    """The demo's own head weights are not equal, and `fastv` has its own normalisation and query too."""
    model, told = demo.model(), []
    config = hawk_compile.HawkConfig(selector="fastv", backend="eager")
    before = model.__dict__.get("_hawk_runtime")
    seen = hawk_compile.show(
        model, demo.processor(), SCENE.pil(), SCENE.questions[0].text, config, max_new_tokens=1, progress=told.append
    )
    assert told == [hawk_compile.Progress(done, 8) for done in range(9)]
    assert model.__dict__.get("_hawk_runtime") is before
    assert seen.weights == pytest.approx([1 / len(seen.weights)] * len(seen.weights))
    np.testing.assert_allclose(np.tensordot(seen.weights, seen.heads, 1), seen.scores, atol=1e-5)


def test_removed_tokens_are_dark():
    pixels = np.full((28, 56, 3), 200, dtype=np.uint8)
    found = dimmed(pixels, np.array([[True, False]]), 0.25)
    assert (found[:, :28] == 200).all() and (found[:, 28:] == 50).all()


@pytest.mark.parametrize(
    ("inputs", "count", "expected"),
    [
        ({"image_grid_thw": torch.tensor([[1, 8, 12]])}, 24, (4, 6)),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, 16, (4, 4)),
        ({"pixel_values": torch.zeros(1, 1, 3, 8, 8)}, 16, (4, 4)),
        ({"pixel_values": torch.zeros(4, 3, 8, 8)}, 64, None),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, 20, None),
    ],
)
def test_grids(inputs, count, expected):
    if expected is not None:
        assert grid(inputs, count) == expected
        return
    with pytest.raises(InputError, match=f"image becomes {count} visual tokens that are no single grid"):
        grid(inputs, count)


def test_the_command_line(shown):
    assert f"unpruned: {SCENE.questions[0].answer}" in shown.stdout and "32 of 156 visual tokens kept" in shown.stdout
    drawn = np.asarray(Image.open(shown.folder / "show.png").convert("RGB"))
    assert drawn.shape[1] > 1000
    for half in np.array_split(drawn, 2):  # the picture above, the heads' maps below
        assert (half < 250).any(-1).mean() > 0.1
    refused = CliRunner().invoke(app, [*shown.arguments, "--out", str(shown.folder / "no" / "folder.png")])
    assert refused.exit_code == 2 and "out must lie in a folder that exists" in refused.stderr
    assert not refused.stdout and "deprecated" not in refused.stderr


def test_titles_of_several_lines_are_whole(tmp_path):
    """Of a square picture, whose panels leave no room of their own above them."""
    square, question = Image.new("RGB", (336, 336)), "How many shapes of the colour of the digit stand beside it? " * 2
    grid = np.ones((12, 12))
    Seen(square, question, 0.8, "hawk", grid > 0, grid, grid[None], [1.0], "$7", "$7").write(tmp_path / "square.png")
    drawn = np.asarray(Image.open(tmp_path / "square.png").convert("L"))
    first = (drawn < 200).any(1).argmax()
    assert first > 2  # rows of pixels
    assert (drawn[first : first + 60] > 200).mean() > 0.8  # text, no picture
