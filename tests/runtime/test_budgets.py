"""Budgets that a ratio for the whole prompt does not say: by score mass, and for every image."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile import Adaptive, HawkConfig
from hawk_compile.errors import ConfigError, InputError, UnsupportedCallError
from hawk_compile.kernels.select.budgets import guaranteed_first, tokens_for_mass
from hawk_compile.plan.quotas import quotas
from tests import eager_reference as reference
from tests import zoo
from tests.capture.rewritten import Rewritten
from tests.marks import slow
from tests.runtime.models import ROUNDING, fresh, generate, new_tokens, plain, prompt
from tests.runtime.test_batches import fresh as unread
from tests.test_architectures import encoded
from tests.zoo import Row, rows

MASS = 0.6
EACH = {"query": "each", "normalization": "softmax"}


def fewest(scores: Tensor, mass: float) -> int:
    """By hand: the fewest scores that hold the share."""
    best = sorted((max(0.0, float(each)) for each in scores), reverse=True)
    return next(n for n in range(1, len(best) + 1) if sum(best[:n]) >= mass * sum(best) * (1 - 1e-6))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", *slow("gemma3")])
def test_each_row_keeps_what_holds_the_mass(name: str) -> None:
    """Plain; with features for later layers, whose kept number is read too; with attention both ways.

    At several sizes, from one graph, and what then runs is the eager model on the tokens kept.
    """
    model = Rewritten(plain(name), ratio=0.0, budget=Adaptive(MASS), **EACH)
    seen = set()
    for size in zoo.sizes(name)[1:4]:
        inputs = encoded(name, plain(name), size)
        out = model(unread(inputs))
        visual = zoo.visual_mask(name, plain(name), inputs)[0]
        count = fewest(out.scores[0][visual], MASS)
        assert count < int(visual.sum())
        keep = reference.kept_positions(out.scores[0][visual], visual, count)
        assert out.keep_indices[0].equal(keep)
        expected, _ = reference.pruned_forward(plain(name), encoded(name, plain(name), size), keep, visual)
        assert out.logits.equal(expected.logits)
        seen.add(count / int(visual.sum()))
    assert len(seen) > 1 or name == "gemma3"  # whose images are all of one size
    assert len(model.graphs) == 1


def check_rows(name: str, model: Any, batch: dict[str, Any], out: Any, report: hawk_compile.Report) -> None:
    """Each row of a batch that was generated keeps and answers what it does by itself."""
    for i in range(len(report.kept_visual_tokens)):
        single = rows.row(plain(name), batch, i)
        alone = generate(model, unread(single), 4)
        by_itself = hawk_compile.report(model)
        assert report.kept_visual_tokens[i] == by_itself.kept_visual_tokens[0]
        assert new_tokens(out, batch, i) == new_tokens(alone, single)
        for together, apart in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[i], apart[0], **ROUNDING)


def test_a_batch_equals_its_rows() -> None:
    name = "qwen3_vl"
    model = fresh(name, 0.0, budget=Adaptive(MASS), **EACH)
    one, other = zoo.sizes(name)[0], zoo.sizes(name)[4]
    batch = rows.encoded(plain(name), prompt(name, one, other, Row(after=4)))
    out = generate(model, unread(batch), 4)
    report = hawk_compile.report(model)
    assert report.kept_tokens == max(len(each) for each in report.keep_indices) < report.prompt_tokens
    assert "budget=Adaptive(mass=" in report.reason
    check_rows(name, model, batch, out, report)


@pytest.mark.parametrize(("ratio", "given", "expected"), [
    (0.5, {}, (1, 20)),
    (0.5, {"max": 0.25}, (1, 10)),
    (0.5, {"max": 3}, (1, 3)),
    (0.9, {"min": 5, "max": 1.0}, (5, 39)),
    (0.0, {"min": 0.5}, (20, 39)),
    (0.9, {"min": 1000, "max": 0.1}, (4, 4)),
])  # fmt: skip
def test_bounds(ratio: float, given: dict[str, Any], expected: tuple[int, int]) -> None:
    """Of a row with 39 visual tokens; fractions are rounded up."""
    assert HawkConfig(ratio=ratio, budget=Adaptive(0.9, **given)).bounds(39) == expected


@pytest.mark.parametrize(("bounds", "expected"), [({"max": 3, "mass": 1.0}, 3), ({"min": 5, "mass": 1e-6}, 5)])
def test_no_row_leaves_its_bounds(bounds: dict[str, Any], expected: int) -> None:
    name = "qwen2_5_vl"
    inputs = encoded(name, plain(name), zoo.sizes(name)[2])
    out = Rewritten(plain(name), ratio=0.0, budget=Adaptive(**bounds), **EACH)(unread(inputs))
    assert int(zoo.visual_mask(name, plain(name), inputs)[0][out.keep_indices[0]].sum()) == expected


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, (8, 8)),
    ({"bucket": 2}, (9, 9)),  # of 16 tokens
    ({"bucket": 16}, (9, 9)),
    ({"bucket": 18}, (11, 11)),
    ({"bucket": 64}, (39, 39)),
    ({"bucket": 10, "min_per_image": 20}, (23, 23)),
    ({"bucket": 10, "ratio": 0.0}, (39, 39)),
])  # fmt: skip
def test_a_row_is_as_long_as_its_bucket(settings: dict[str, Any], expected: tuple[int, int]) -> None:
    """Of a row with 39 visual tokens and 7 others, one image."""
    config = HawkConfig(**{"ratio": 0.8, **settings})
    assert config.bounds(39, config.floor(39), 7) == expected


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3", "qwen3_vl", "llava_onevision")])
def test_a_bucket_keeps_the_next_best(name: str) -> None:
    """From one graph at several sizes, and what runs is the eager model on the tokens kept."""
    model, bucket = Rewritten(plain(name), ratio=0.9, bucket=8), 8
    for size in zoo.sizes(name):
        inputs = encoded(name, plain(name), size)
        out = model(unread(inputs))
        visual = zoo.visual_mask(name, plain(name), inputs)[0]
        length = len(out.keep_indices[0])
        whole = int(visual.sum())
        assert length % bucket == 0 or length == len(visual)
        count = length - (len(visual) - whole)
        assert math.ceil(whole * Fraction("0.1")) <= count < math.ceil(whole * Fraction("0.1")) + bucket
        keep = reference.kept_positions(out.scores[0][visual], visual, count)
        assert out.keep_indices[0].equal(keep)
        expected, _ = reference.pruned_forward(plain(name), encoded(name, plain(name), size), keep, visual)
        torch.testing.assert_close(out.logits, expected.logits, **ROUNDING)
    assert len(model.graphs) == 1


def test_a_row_keeps_the_same_alone_and_in_a_batch() -> None:
    name = "qwen3_vl"
    model = fresh(name, 0.8, bucket=8)
    batch = rows.encoded(plain(name), prompt(name, zoo.sizes(name)[0], zoo.sizes(name)[4], Row(after=4)))
    out = generate(model, unread(batch), 4)
    report = hawk_compile.report(model)
    assert "bucket=8" in report.reason and report.kept_tokens % 8 == 0
    check_rows(name, model, batch, out, report)


@pytest.mark.parametrize(("settings", "message"), [
    ({"bucket": 0}, "bucket must be a whole number of at least 1, got 0"),
    ({"bucket": 64.0}, "bucket must be a whole number of at least 1, got 64.0"),
    ({"bucket": True}, "bucket must be a whole number of at least 1, got True"),
    ({"bucket": 64, "budget": Adaptive()}, "bucket=64 fixes a row's length .*: give one of them"),
])  # fmt: skip
def test_buckets_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HawkConfig(**settings)


@pytest.mark.slow
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
    ("idefics3", Row(images=((1, 1), (1, 2))), [9] * 4),  # of two tiles and the whole picture
])  # fmt: skip
def test_every_image_keeps_its_best(name: str, row: Row, sizes: list[int] | None, quota: str) -> None:
    """quota="image": its own share. Else at least `min_per_image`, and the best of the whole prompt beside them."""
    least, ratio = 2, 0.8
    settings = {"quota": "image"} if quota == "image" else {"min_per_image": least}
    inputs = prompt(name, row)
    out = Rewritten(plain(name), ratio=ratio, **settings)(inputs)
    total = int(zoo.visual_mask(name, plain(name), inputs).sum())
    images = parts(name, inputs, sizes or [total // 2] * 2)
    score = out.scores[0].tolist()
    best = [sorted(image, key=lambda place: (-score[place], place)) for image in images]
    own = [math.ceil(len(image) * 2 / 10) for image in images]
    kept = {place for image, count in zip(best, own if quota == "image" else [least] * 9, strict=False)
            for place in image[:count]}
    others = sorted(set().union(*images) - kept, key=lambda place: (-score[place], place))
    if quota == "prompt":
        kept |= set(others[: max(0, math.ceil(total * 2 / 10) - len(kept))])
    assert {each for each in out.keep_indices[0].tolist() if any(each in image for image in images)} == kept


def one_image(inputs: dict[str, Tensor], places: list[list[int]], which: int) -> dict[str, Tensor]:
    """The prompt with one of its images alone."""
    others = torch.tensor([place for image, each in enumerate(places) if image != which for place in each])
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stays[others] = False
    alone = {key: value[:, stays] if value.shape[1:2] == stays.shape else value for key, value in inputs.items()}
    patches = inputs["image_grid_thw"].prod(1).tolist()
    alone["pixel_values"] = inputs["pixel_values"].split(patches)[which]
    alone["image_grid_thw"] = inputs["image_grid_thw"][which : which + 1]
    return alone


@pytest.mark.parametrize("normalization", [*slow("l2"), "minmax"])
def test_images_scored_by_themselves(normalization: str) -> None:
    """normalize_per="image": the scores of each image are those that it has in a prompt of its own."""
    name, settings = "qwen2_5_vl", {"normalization": normalization, "ratio": 0.5}
    inputs = prompt(name, Row(images=((4, 6), (2, 3), (2, 2))))
    images = parts(name, inputs, [24, 6, 4])
    apart = Rewritten(plain(name), normalize_per="image", **settings)(unread(inputs)).scores[0]
    together = Rewritten(plain(name), **settings)(unread(inputs)).scores[0]
    model = Rewritten(plain(name), **settings)
    for which, places in enumerate(images):
        alone = one_image(inputs, images, which)
        scores = model(alone).scores[0]
        expected = scores[zoo.visual_mask(name, plain(name), alone)[0]]
        torch.testing.assert_close(apart[places], expected, **ROUNDING)
        assert not together[places].allclose(expected, rtol=1e-2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("qwen3_vl")])
def test_a_video_is_frames_in_generate_too(name: str, options: dict[str, Any]) -> None:
    """Which encodes it before the prefill, and hands on no more how many frames it has."""
    model = fresh(name, 0.9, min_per_image=1)
    inputs = prompt(name, Row(video=(3, 2, 2)), Row(images=((2, 2),), video=(2, 2, 3)))
    generate(model, inputs, 2, **options)
    kept = hawk_compile.report(model).kept_visual_tokens.tolist()
    assert kept == [each for each in (3, 3) for _ in range(options.get("num_beams", 1))]


def test_a_tile_is_an_image_in_generate_too() -> None:
    """Of rows whose encoder hands on their tiles as one; the second row has none."""
    model = fresh("smolvlm", 0.9, quota="image")
    inputs = prompt("smolvlm", Row(images=((1, 1), (1, 2))), Row(after=4), Row(images=((1, 1),), after=2))
    for beams in (1, 2):
        generate(model, unread(inputs), 2, num_beams=beams)
        kept = hawk_compile.report(model).kept_visual_tokens.tolist()
        assert kept == [each for each in (4, 0, 1) for _ in range(beams)]


def test_images_of_several_rows() -> None:
    """With padding, and a row without any."""
    name = "qwen2_5_vl"
    model = fresh(name, 0.8, quota="image")
    three = [Row(images=((4, 6), (2, 3))), Row(after=3), Row(images=((2, 2),), after=9)]
    with torch.no_grad():
        model(**prompt(name, *three))
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [5 + 2, 0, 1]


def test_what_is_guaranteed_counts_towards_the_mass() -> None:
    """Image 0 holds nearly all of the score; what image 1 keeps must not take the place of what holds the mass."""
    scores = torch.tensor([[1.0] * 10 + [0.01] * 10])
    candidate, image = torch.ones(1, 20, dtype=torch.bool), torch.arange(20)[None] // 10
    floor = torch.full((1, 20), 5)
    ranks = guaranteed_first(scores, scores, candidate, image, floor)
    budget = tokens_for_mass(scores, candidate, 0.9, torch.tensor([1]), torch.tensor([20]), ranks)
    best = ranks[0].argsort(descending=True)[: int(budget)]
    assert scores[0, best].sum() >= 0.9 * scores.sum() > scores[0, best[:-1]].sum()
    assert (image[0, best] == 1).sum() == 5


def test_what_a_greedy_order_did_not_take_goes_by_score() -> None:
    """Image 1 keeps its best two, though the order took none of it."""
    order = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.9, 0.1, 0.8]])
    image = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    floor = torch.where(image == 1, 2, 0)
    ranks = guaranteed_first(order, scores, torch.ones(1, 7, dtype=torch.bool), image, floor)
    assert ranks[0].argsort(descending=True).tolist() == [4, 6, 0, 1, 2, 3, 5]


def test_images_that_cannot_be_told_apart() -> None:
    """GLM-4V holds the places of a video's features by the ids of images."""
    model = fresh("glm4v", 0.5, quota="image")
    with pytest.raises(InputError, match="min_per_image, quota and normalize_per find the tokens of images"):
        model(**prompt("glm4v", Row(video=(2, 2, 3))))


def test_features_that_several_rows_have_as_one() -> None:
    ids = torch.tensor([[7, 1, 7], [7, 1, 2]])
    with pytest.raises(UnsupportedCallError, match="hands on the images of several rows as one"):
        quotas(ids, {"image": 7}, {"image": [3]}, HawkConfig(quota="image"))
    assert quotas(ids, {"image": 7}, {"image": [1, 0, 1, 1]}, HawkConfig(quota="image")).total.tolist() == [2, 1]


def test_features_of_which_nothing_is_left_are_refused() -> None:
    """transformers repeats a video of GLM-4V by the placeholders of videos, of which its prompts have none."""
    with pytest.raises(InputError, match=r"holds no features of videos .* leave out num_beams"):
        generate(fresh("glm4v", 0.5), prompt("glm4v", Row(video=(2, 2, 3))), 2, num_beams=2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Adaptive(mass=0), r"mass .* must be in \(0, 1\], got 0"),
    (lambda: Adaptive(min=0), r"min must be a number of tokens .* got 0"),
    (lambda: Adaptive(max=1.5), r"max must be a number of tokens .* got 1.5"),
    (lambda: Adaptive(min=9, max=3), "min must not be above max, got min=9 and max=3"),
    (lambda: fresh("llava", budget=0.9), r"budget must be hawk_compile.Adaptive\(...\) or None, got 0.9"),
    (lambda: fresh("llava", quota="frame"), "quota must be one of prompt, image, got 'frame'"),
    (lambda: fresh("llava", min_per_image=-1), "min_per_image must be a number of visual tokens, .* got -1"),
    (lambda: fresh("llava", budget=Adaptive(), quota="image"), 'quota="image" sets one for each: give one of them'),
])  # fmt: skip
def test_settings_that_cannot_be_right(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
