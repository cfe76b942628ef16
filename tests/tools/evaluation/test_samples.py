"""Reading questions: what is wrong with one is said with its line, and the rest can go on without it."""

import json

import pytest
from PIL import Image

from hawk_compile.errors import InputError
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.evaluation.samples import read_samples

GOOD = {"image": "cat.png", "question": "What is this?", "answers": ["cat", "a cat"]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "cat.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path


def written(folder, *records):
    path = folder / "data.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records) + "\n")
    return path


def test_a_file_of_records(folder):
    path = written(
        folder, GOOD, "", {"images": ["cat.png", "cat.png"], "question": "Same?", "answer": 1, "kind": "yes"}
    )
    first, second = read_samples(path)
    assert (first.answers, first.origin) == (("cat", "a cat"), f"{path} line 1")
    assert (second.answers, second.kind, second.origin) == (("1",), "yes", f"{path} line 3")
    assert [each.size for each in second.pictures()] == [(30, 20), (30, 20)]
    assert len(read_samples(path, limit=1)) == 1


def test_records_and_pictures_of_ones_own():
    image = Image.new("L", (8, 8))
    read = read_samples([{"image": image, "question": "?", "answer": "yes"}, Sample((image,), "?", ("no",))])
    assert [each.answers for each in read] == [("yes",), ("no",)]
    assert read[0].pictures()[0].mode == "RGB"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"line 2 is no JSON .*write one object per line"),
        ("[1]", r"line 2 must be an object with image, images, question"),
        ({**GOOD, "image": "dog.png"}, r"line 2: there is no image .*dog.png"),
        ({**GOOD, "image": "broken.png"}, r"line 2: .*broken.png cannot be read as an image"),
        ({"question": "What?", "answer": "cat"}, r"line 2: a question needs an image, got none"),
        ({"image": "cat.png", "question": "What?"}, r"line 2: answers must be one text or several, got \[\]"),
        ({**GOOD, "question": " "}, r"line 2: question must be text"),
        ({**GOOD, "image": 3}, r"line 2: images must be paths or pictures, got int"),
        ({**GOOD, "image": "a\x00b.png"}, r"line 2: there is no image"),
        ({**GOOD, "answers": [float("nan")]}, r"line 2 is no JSON .*NaN is no number"),
        ({**GOOD, "answers": ""}, r"line 2: answers must be one text or several, got \[''\]"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(folder, bad, message):
    path = written(folder, GOOD, bad, GOOD)
    with pytest.raises(InputError, match=message):
        read_samples(path)
    heard = []
    assert len(read_samples(path, skip_bad=True, warn=heard.append)) == 2
    assert len(heard) == 1 and heard[0].startswith("skipped: ") and "line 2" in heard[0]


def test_a_line_that_is_no_utf8_is_named(folder):
    path = written(folder, GOOD)
    path.write_bytes(path.read_bytes() + '{"question": "Café?"}'.encode("latin-1"))
    with pytest.raises(InputError, match="line 2 is no JSON in UTF-8"):
        read_samples(path)
    assert len(read_samples(path, skip_bad=True)) == 1


def test_no_samples(folder):
    with pytest.raises(InputError, match="data must hold at least one sample, got none"):
        read_samples(written(folder, ""))
    with pytest.raises(InputError, match="data must be a JSON Lines file"):
        read_samples(folder / "nothing.jsonl")
    with pytest.raises(InputError, match="with a split of train, calibration, tune, test, got 'demo:best'"):
        read_samples("demo:best")


def test_the_demo():
    samples = read_samples("demo:tune", limit=6)
    assert len(samples) == 6 and {each.kind for each in samples} <= {"digit", "shape", "color"}
    assert samples[0].images == samples[3].images and samples[0].origin == "tune scene 0"
