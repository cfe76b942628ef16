"""Scenes: the same everywhere, splits that share nothing, one right answer to each question."""

import itertools

import numpy as np
import pytest

from hawk_compile.tools.demo import scenes
from hawk_compile.tools.demo.scenes import SPLITS, make_scene, pick_questions, token_cover


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_a_function_of_split_and_index(split):
    first, second = make_scene(split, 7), make_scene(split, 7)
    np.testing.assert_array_equal(first.image, second.image)
    assert (first.objects, first.questions) == (second.objects, second.questions)
    assert not np.array_equal(first.image, make_scene(split, 7 + len(scenes.SIZES)).image)


def test_splits_share_no_digit_and_no_scene():
    digits = [{int(i) for d in scenes.DIGITS for i in scenes.digit_ids(split, d)} for split in SPLITS]
    assert sum(map(len, digits)) == len(set().union(*digits)) == 1797
    assert all(len(scenes.digit_ids(split, d)) >= 5 for split in SPLITS for d in scenes.DIGITS)
    layouts = [scenes.lay_out(split, 3, (336, 336))[1] for split in SPLITS]
    assert all(a != b for a, b in itertools.combinations(layouts, 2))


def test_only_digits_of_the_split_are_drawn(monkeypatch):
    drawn = []
    real = scenes.digit_ids
    monkeypatch.setattr(scenes, "digit_ids", lambda split, digit: drawn.append(split) or real(split, digit))
    make_scene("test", 0)
    assert set(drawn) == {"test"}


@pytest.mark.parametrize("index", range(12))
def test_every_question_has_one_answer(index):
    scene = make_scene("tune", index)
    things = [thing for thing in scene.objects if thing.kind != "scribble"]
    assert len(scene.questions) == 2 * len(things) >= 20
    assert len({question.text for question in scene.questions}) == len(scene.questions)
    for question in scene.questions:
        first, second = question.text.split()
        if first == "color":
            matches = [(t, t.color) for t in things if t.name == second]
        else:
            matches = [(t, t.name) for t in things if (t.color, t.kind) == (first, second)]
        assert matches == [(scene.objects[question.target], question.answer)]


def test_the_answer_depends_on_the_picture_and_on_the_question():
    by_text: dict[str, set[str]] = {}
    for index in range(40):
        scene = make_scene("tune", index, (336, 336))
        assert len({question.answer for question in scene.questions}) > 8
        for question in scene.questions:
            by_text.setdefault(question.text, set()).add(question.answer)
    assert all(len(answers) > 2 for answers in by_text.values())


@pytest.mark.parametrize("size", scenes.SIZES)
def test_sizes_and_boxes(size):
    scene = make_scene("train", 1, size)
    assert scene.size == size and scene.image.dtype == np.uint8 and scene.pil().size == size[::-1]
    assert size[0] % 28 == size[1] % 28 == 0 and size[0] * size[1] // 28**2 >= 144
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
    for a, b in itertools.combinations([thing.box for thing in scene.objects], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], "objects overlap"


def test_sizes_vary_and_are_not_all_square():
    assert {make_scene("test", index).size for index in range(len(scenes.SIZES))} == set(scenes.SIZES)
    assert any(height != width for height, width in scenes.SIZES)


def test_an_object_is_where_its_box_says():
    scene = make_scene("train", 2)
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        inside = scene.image[top:bottom, left:right].astype(int)
        assert np.abs(inside - scenes.COLORS[thing.color]).max(-1).min() < 40, thing


def test_token_cover():
    cover = token_cover((28, 14, 84, 56), (336, 448)).reshape(12, 16)
    assert cover[0, 1] == 0.5 and cover[1, 2] == 1
    assert cover.sum() * 28**2 == 56 * 42


def test_pick_questions_asks_about_different_objects():
    pairs = pick_questions("test", 10, per_scene=4)
    assert len(pairs) == 10
    assert [scene.index for scene, _ in pairs] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert len({question.target for _, question in pairs[:4]}) == 4
    assert [q for _, q in pairs] == [q for _, q in pick_questions("test", 10, per_scene=4)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dev", 0), "split must be one of"),
        (("test", -1), "index must be 0 or more"),
        (("test", 0, (336, 350)), "multiples of 28"),
        (("test", 0, (308, 336)), "at least 336"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_scene(*arguments)
    with pytest.raises(ValueError, match="per_scene must be 1 to 10"):
        pick_questions("test", 4, per_scene=11)
