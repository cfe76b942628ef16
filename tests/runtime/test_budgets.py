"""Budgets that a ratio for the whole prompt does not say: by score mass, and for every image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile import Adaptive
from hawk_compile.errors import ConfigError
from tests import eager_reference as reference
from tests import zoo
from tests.runtime.models import ROUNDING, fresh, generate, new_tokens, plain, prompt
from tests.runtime.test_batches import fresh as unread
from tests.test_architectures import encoded
from tests.zoo import Row, rows

MASS = 0.6
EACH = {"query": "each", "normalization": "softmax"}
MODELS = ("qwen2_5_vl", "qwen3_vl", "gemma3")
"""Plain; with features for later layers, whose kept number is read too; with attention both ways."""


def fewest(scores: Tensor, mass: float) -> int:
    """By hand: the fewest scores that hold the share."""
    best = sorted((max(0.0, float(each)) for each in scores), reverse=True)
    return next(n for n in range(1, len(best) + 1) if sum(best[:n]) >= mass * sum(best) * (1 - 1e-6))


@pytest.mark.parametrize("name", MODELS)
def test_each_row_keeps_what_holds_the_mass(name: str) -> None:
    """At several sizes, from one compilation, and what then runs is the eager model on the tokens kept."""
    model = fresh(name, 0.0, budget=Adaptive(MASS), **EACH)
    seen = set()
    for size in zoo.sizes(name)[1:4]:
        inputs = encoded(name, model, size)
        with torch.no_grad():
            out = model(**unread(inputs))
        report = hawk_compile.report(model)
        visual = zoo.visual_mask(name, model, inputs)[0]
        assert report.scores is not None
        count = fewest(report.scores[0][visual], MASS)
        assert report.kept_visual_tokens.tolist() == [count] and count < int(visual.sum())
        keep = reference.kept_positions(report.scores[0][visual], visual, count)
        assert report.keep_indices[0].equal(keep)
        expected, _ = reference.pruned_forward(plain(name), encoded(name, plain(name), size), keep, visual)
        assert out.logits.equal(expected.logits)
        seen.add(count / int(visual.sum()))
    assert len(seen) > 1 or name == "gemma3"  # whose images are all of one size
    assert model.__dict__["_hawk_runtime"].compilations == 1


def test_a_batch_equals_its_rows() -> None:
    name = "qwen3_vl"
    model = fresh(name, 0.0, budget=Adaptive(MASS), **EACH)
    one, other = zoo.sizes(name)[0], zoo.sizes(name)[4]
    batch = rows.encoded(plain(name), prompt(name, one, other, Row(after=4)))
    out = generate(model, unread(batch), 4)
    report = hawk_compile.report(model)
    assert report.kept_tokens == max(len(each) for each in report.keep_indices) < report.prompt_tokens
    for i in range(3):
        single = rows.row(plain(name), batch, i)
        alone = generate(model, unread(single), 4)
        by_itself = hawk_compile.report(model)
        assert report.kept_visual_tokens[i] == by_itself.kept_visual_tokens[0]
        assert new_tokens(out, batch, i) == new_tokens(alone, single)
        for together, apart in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[i], apart[0], **ROUNDING)


@pytest.mark.parametrize(("ratio", "bounds", "expected"), [
    (0.5, {}, lambda count: -(-count // 2)),
    (0.5, {"max": 0.25}, lambda count: -(-count // 4)),
    (0.5, {"max": 3}, lambda count: 3),
    (0.9, {"min": 5, "max": 1.0, "mass": 1e-6}, lambda count: 5),
    (0.0, {"min": 0.5, "mass": 1e-6}, lambda count: -(-count // 2)),
    (0.9, {"mass": 1.0, "max": 1000}, lambda count: count),
])  # fmt: skip
def test_bounds(ratio: float, bounds: dict[str, Any], expected: Any) -> None:
    name = "qwen2_5_vl"
    model = fresh(name, ratio, budget=Adaptive(**{"mass": 0.999, **bounds}), **EACH)
    inputs = prompt(name, zoo.sizes(name)[2])
    with torch.no_grad():
        model(**inputs)
    report = hawk_compile.report(model)
    assert report.kept_visual_tokens.tolist() == [expected(int(report.visual_tokens))]
    assert "budget=Adaptive(mass=" in report.reason


def test_through_inductor() -> None:
    name = "qwen3_vl"
    model = hawk_compile.optimize(zoo.build(name, layers=1), ratio=0.0, budget=Adaptive(MASS), min_per_image=2, **EACH)
    eager = hawk_compile.optimize(
        zoo.build(name, layers=1), ratio=0.0, budget=Adaptive(MASS), min_per_image=2, backend="eager", **EACH
    )
    for size in zoo.sizes(name)[1:3]:
        inputs = encoded(name, model, size)
        with torch.no_grad():
            torch.testing.assert_close(model(**unread(inputs)).logits, eager(**unread(inputs)).logits, **ROUNDING)
        assert hawk_compile.report(model).keep_indices[0].equal(hawk_compile.report(eager).keep_indices[0])
    assert model.__dict__["_hawk_runtime"].compilations == 1


def parts(name: str, inputs: dict[str, Tensor], sizes: list[int]) -> list[list[int]]:
    """The positions of each image in order, one row."""
    visual = zoo.visual_mask(name, plain(name), inputs)[0].nonzero().squeeze(1).tolist()
    return [[visual.pop(0) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize("quota", ["image", "prompt"])
@pytest.mark.parametrize(("name", "row", "sizes"), [
    ("qwen2_5_vl", Row(images=((4, 6), (2, 3), (2, 2))), [24, 6, 4]),
    ("llava", Row(images=((1, 1), (1, 1))), None),
    ("qwen2_5_vl", Row(video=(3, 2, 4)), [8, 8, 8]),
])  # fmt: skip
def test_every_image_keeps_its_best(name: str, row: Row, sizes: list[int] | None, quota: str) -> None:
    """quota="image": its own share. Else at least `min_per_image`, and the best of the whole prompt beside them."""
    least, ratio = 2, 0.8
    settings = {"quota": "image"} if quota == "image" else {"min_per_image": least}
    model = fresh(name, ratio, **settings)
    inputs = prompt(name, row)
    with torch.no_grad():
        model(**inputs)
    report = hawk_compile.report(model)
    total = int(report.visual_tokens)
    images = parts(name, inputs, sizes or [total // 2] * 2)
    assert report.scores is not None
    score = report.scores[0].tolist()
    best = [sorted(image, key=lambda place: (-score[place], place)) for image in images]
    own = [math.ceil(len(image) * 2 / 10) for image in images]
    kept = {place for image, count in zip(best, own if quota == "image" else [least] * 9, strict=False)
            for place in image[:count]}
    others = sorted(set().union(*images) - kept, key=lambda place: (-score[place], place))
    if quota == "prompt":
        kept |= set(others[: max(0, math.ceil(total * 2 / 10) - len(kept))])
    assert {each for each in report.keep_indices[0].tolist() if any(each in image for image in images)} == kept
    assert report.kept_visual_tokens.tolist() == [len(kept)]


def test_images_of_several_rows() -> None:
    """With padding, and a row without any."""
    name = "qwen2_5_vl"
    model = fresh(name, 0.8, quota="image")
    three = [Row(images=((4, 6), (2, 3))), Row(after=3), Row(images=((2, 2),), after=9)]
    with torch.no_grad():
        model(**prompt(name, *three))
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [5 + 2, 0, 1]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Adaptive(mass=0), r"mass .* must be in \(0, 1\], got 0"),
    (lambda: Adaptive(min=0), r"min must be a number of tokens .* got 0"),
    (lambda: Adaptive(max=1.5), r"max must be a number of tokens .* got 1.5"),
    (lambda: Adaptive(min=9, max=3), "min must not be above max, got min=9 and max=3"),
    (lambda: fresh("llava", budget=0.9), r"budget must be hawk_compile.Adaptive\(...\) or None, got 0.9"),
    (lambda: fresh("llava", quota="frame"), "quota must be one of prompt, image, got 'frame'"),
    (lambda: fresh("llava", min_per_image=-1), "min_per_image is a number of visual tokens, .* got -1"),
    (lambda: fresh("llava", budget=Adaptive(), quota="image"), 'quota="image" sets one for each: give one of them'),
])  # fmt: skip
def test_settings_that_cannot_be_right(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
