"""Encoded images that are kept: the answers are those of a model that keeps nothing, bit for bit, and what was encoded
is not encoded again."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import features_of
from hawk_compile.errors import ConfigError
from tests import zoo
from tests.marks import slow
from tests.runtime.models import RATIO, fresh, generate, picture, plain, prompt, pruned
from tests.zoo import Row

NAME = "qwen2_5_vl"
ENCODERS = ("get_image_features", "get_video_features")
WHOLE = ("qwen2_5_vl", *slow("llava", "qwen3_vl"))


class Counted:
    """How many images each call of an encoder was given, in the order of the calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self) -> list[Any]:
        """The calls since this was asked last."""
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts the calls of the encoders of models' classes."""
    counted = Counted()

    def watch(model: Any) -> Any:
        kind = type(model.base_model)
        for name in ENCODERS:
            if (method := vars(kind).get(name)) is not None and not hasattr(method, "counts"):
                monkeypatch.setattr(kind, name, counting(method, counted))
        return model

    counted.watch = watch  # type: ignore[attr-defined]
    return counted  # type: ignore[return-value]


def counting(method: Any, counted: Counted) -> Any:
    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.calls.append(1)
        return method(self, *args, **kwargs)

    watched.counts = True  # type: ignore[attr-defined]
    return watched


def keeping(name: str = NAME, size: Any = "64MB", **settings: Any) -> Any:
    return fresh(name, image_cache=size, **settings)


def use(model: Any) -> Any:
    return model._hawk_runtime.images.use()


@torch.no_grad()
def features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[V, D]: what enters the merge of a call."""
    outputs = run_encoders(model, dict(inputs))["mm_encoder_outputs"]
    parts = [features_of(output) for output in outputs.values() if output is not None]
    return torch.cat([part.flatten(0, -2) for each in parts for part in ([each] if isinstance(each, Tensor) else each)])


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def asked_again(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same picture, and another question."""
    ids = inputs["input_ids"].clone()
    ids[:, -5:-3] = inputs["input_ids"][:, -4:-2]
    return {name: value.clone() for name, value in inputs.items()} | {"input_ids": ids}


@pytest.mark.parametrize("name", WHOLE)
def test_a_second_question_encodes_nothing(name: str, encoded: Any) -> None:
    """By a call of the model and by generate, which share what is kept; the report counts."""
    other, model = pruned(name), encoded.watch(keeping(name))
    first, count = prompt(name, zoo.sizes(name)[1]), len(zoo.sizes(name)[1].images)
    second = asked_again(first)
    for inputs in (first, second):
        expected, answer = logits(other, inputs), generate(other, inputs, 2)
        encoded()
        assert logits(model, inputs).equal(expected)
        found = generate(model, inputs, 2)
        assert found.sequences.equal(answer.sequences) and all(map(torch.equal, found.logits, answer.logits))
        assert bool(encoded()) == (inputs is first)
    report = hawk_compile.report(model).image_cache
    numbers = (report.hits, report.misses, report.passed_over, report.images)
    assert numbers == (3 * count, count, 0, count) and report.bytes > 0
    assert hawk_compile.report(other).image_cache is None


@pytest.mark.parametrize("name", zoo.NAMES)
def test_features_of_every_architecture(name: str, encoded: Any) -> None:
    """One image, several, tiles; then one of them alone, which those that are encoded one by one know."""
    model = encoded.watch(keeping(name))
    for row in (zoo.sizes(name)[1], zoo.sizes(name)[4], zoo.sizes(name)[-1]):
        inputs = prompt(name, row)
        expected = features(plain(name), inputs)
        encoded()
        found = features(model, inputs)
        assert encoded()
        assert features(model, inputs).equal(found) and not encoded(), row
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert len(row.images) > 1 or inputs["pixel_values"].shape[0] > 1 or found.equal(expected)
    assert not use(model).passed_over
    structure = next(iter(model._hawk_runtime.images.structures.values()))
    assert structure.alone.get("image", True)


def test_images_of_one_call_and_of_others(encoded: Any) -> None:
    """Turns of a conversation that is given whole each time, batches, and pictures that stand in one twice: each is
    encoded once."""
    model = encoded.watch(keeping())
    a, b, c = (2, 2), (2, 4), (4, 2)
    drawn = {size: prompt(NAME, Row(images=(size,)), seed=number) for number, size in enumerate((a, b, c))}

    def holding(*rows: Any) -> dict[str, Tensor]:
        """Rows of pictures that look as they do alone."""
        inputs = prompt(NAME, *(Row(images=row) for row in rows))
        return inputs | {"pixel_values": torch.cat([drawn[size]["pixel_values"] for row in rows for size in row])}

    alone = {size: features(plain(NAME), inputs) for size, inputs in drawn.items()}
    turns = [([a], 1), ([a, b], 2), ([a, b, c], 1), ([a, a], 0), ([c, a, b], 0)]
    for row, new in turns:  # the first time that there are two, they are encoded together as well
        encoded()
        assert features(model, holding(row)).equal(torch.cat([alone[size] for size in row])), row
        assert len(encoded()) == new, row
    assert features(model, holding([c], [a, b], [a])).equal(torch.cat([alone[size] for size in (c, a, b, a)]))
    assert not encoded() and use(model).images == 3


def test_what_is_kept_does_not_depend_on_what_stood_beside_it() -> None:
    name, sizes = "llava", ((1, 1), (1, 1))
    together = prompt(name, Row(images=sizes))
    alone = prompt(name, Row(images=sizes[:1])) | {"pixel_values": together["pixel_values"][:1]}
    first, second = keeping(name), keeping(name)
    features(first, together)
    assert features(first, alone).equal(features(second, alone)) and use(first).misses == 2
    assert features(first, together).equal(features(second, together))


def test_images_that_cannot_be_told_apart_are_kept_as_a_call(monkeypatch: pytest.MonkeyPatch, encoded: Any) -> None:
    """Where those of a call change each other, which is seen at the first call with several."""
    kind = type(plain("llava").base_model)
    method = kind.get_image_features

    @functools.wraps(method)
    def mixing(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
        return method(self, pixel_values - pixel_values.mean(0, keepdim=True) * (len(pixel_values) > 1), **kwargs)

    monkeypatch.setattr(kind, "get_image_features", mixing)
    model = encoded.watch(keeping("llava"))
    inputs = prompt("llava", Row(images=((1, 1), (1, 1))))
    expected = features(plain("llava"), inputs)
    assert [features(model, inputs).equal(expected) for _ in range(3)] == [True] * 3
    encoded()
    assert features(model, inputs).equal(expected) and not encoded()


def test_a_video(encoded: Any) -> None:
    model, inputs = encoded.watch(keeping()), prompt(NAME, Row(video=(3, 2, 2)))
    expected = features(plain(NAME), inputs)
    encoded()
    assert [features(model, inputs).equal(expected) for _ in range(2)] == [True, True] and len(encoded()) == 1


@pytest.mark.slow
def test_new_images_in_a_later_turn(encoded: Any) -> None:
    """On a cache, of the same picture: it is not encoded again."""
    other, model, inputs = pruned(NAME), encoded.watch(keeping()), picture(NAME)
    found = []
    for each in (other, model):
        out = generate(each, inputs, 3)
        ids = torch.cat([out.sequences, inputs["input_ids"]], 1)
        later = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        types = inputs["mm_token_type_ids"]
        later["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, 3), types], 1)
        encoded()
        found.append(generate(each, later, 3, past_key_values=out.past_key_values))
        assert len(encoded()) == (each is other)
    assert found[0].sequences.equal(found[1].sequences) and all(map(torch.equal, found[0].logits, found[1].logits))


def test_the_compiled_encoder() -> None:
    """Keeps what it makes itself, and takes nothing that the eager one has made."""
    model, expected = keeping(compile_vision=True), features(plain(NAME), picture(NAME))
    found = features(model, picture(NAME))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert features(model, picture(NAME)).equal(found)
    assert (use(model).hits, use(model).misses) == (1, 1)
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", image_cache="64MB")
    assert features(model, picture(NAME)).equal(expected) and (use(model).hits, use(model).misses) == (1, 2)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_settings_per_image(name: str) -> None:
    """The features of each image or tile are looked at apart, kept or not."""
    model, other = keeping(name, quota="image"), fresh(name, quota="image")
    inputs = prompt(name, zoo.sizes(name)[-1])
    entries = []
    for each in (other, model, model):
        with torch.no_grad():
            output = run_encoders(each, dict(inputs))["mm_encoder_outputs"]["image"]
        entries.append([part.shape for part in features_of(output)])
    assert entries[0] == entries[1] == entries[2] and use(model).hits


def test_what_is_kept_is_bounded(encoded: Any) -> None:
    pictures = [prompt(NAME, Row(images=((2, 2),)), seed=seed) for seed in range(4)]
    model = encoded.watch(keeping())
    features(model, pictures[0])
    size = use(model).bytes
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", image_cache=2 * size + 1)
    encoded()
    for which, new in ((0, 1), (1, 1), (0, 0), (2, 1), (0, 0), (1, 1), (3, 1), (0, 1)):
        features(model, pictures[which])
        assert len(encoded()) == new, which
        assert use(model).bytes <= 2 * size + 1 and use(model).images <= 2
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", image_cache=size - 1)
    for _ in range(2):
        assert features(model, pictures[0]).equal(features(plain(NAME), pictures[0]))
    assert (use(model).hits, use(model).images) == (0, 0) and "and image_cache is" in use(model).reason


def test_side_by_side() -> None:
    pictures = [prompt(NAME, Row(images=((2, 2),)), seed=seed) for seed in range(3)]
    expected = [features(plain(NAME), inputs) for inputs in pictures]
    model = keeping(size=2 * expected[0].nbytes)
    start = threading.Barrier(4, timeout=60)

    def ask(which: int) -> bool:
        start.wait()
        found = [(which + turn) % 3 for turn in range(12)]
        return all(features(model, pictures[each]).equal(expected[each]) for each in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    assert use(model).hits + use(model).misses == 48 and use(model).bytes <= use(model).limit


def test_what_a_caller_writes_is_not_kept() -> None:
    model, expected = keeping("llava"), features(plain("llava"), picture("llava"))
    for _ in range(3):
        with torch.no_grad():
            output = run_encoders(model, dict(picture("llava")))["mm_encoder_outputs"]["image"]
        assert torch.cat([*features_of(output)]).equal(expected)
        for part in features_of(output):
            part.zero_()
    assert use(model).hits


def test_what_was_kept_in_inference_mode_is_taken_outside() -> None:
    model = keeping("llava")
    with torch.inference_mode():
        features(model, picture("llava"))
    found = features(model, picture("llava"))
    assert found.equal(features(plain("llava"), picture("llava"))) and use(model).hits and not found.is_inference()


def test_models_share_nothing_and_nothing_travels(encoded: Any) -> None:
    first, second = encoded.watch(keeping()), keeping()
    before = len(pickle.dumps(second))
    for model in (first, second):
        features(model, picture(NAME))
        assert encoded() == [1]
    copied = copy.deepcopy(first)
    assert (use(first).images, use(copied).images) == (1, 0)
    features(copied, picture(NAME))
    assert encoded() == [1] and len(pickle.dumps(second)) < before + use(second).bytes


def test_it_goes_with_restore_and_stays_with_other_settings(encoded: Any) -> None:
    model = encoded.watch(keeping())
    features(model, picture(NAME))
    images = model._hawk_runtime.images
    kept = weakref.ref(next(iter(images.outputs.values()))[0])
    hawk_compile.optimize(model, ratio=0.3, backend="eager", image_cache="64MB")
    encoded()
    features(model, picture(NAME))
    assert not encoded() and model._hawk_runtime.images is images
    del images
    hawk_compile.restore(model)
    gc.collect()
    assert kept() is None
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    assert model._hawk_runtime.images is None
    hawk_compile.optimize(model, ratio=RATIO, backend="eager", image_cache="64MB")
    features(model, picture(NAME))
    assert encoded() and use(model).hits == 0


@pytest.mark.parametrize("size", [0, -1, True, False, 1.5, "256", "0MB", "1 XB", "MB", b"1MB", [1]])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ConfigError, match="image_cache must be a number of bytes"):
        hawk_compile.HawkConfig(image_cache=size)


def test_sizes() -> None:
    for size, expected in ((5, 5), ("5B", 5), ("1.5 kb", 1500), ("256MB", 256 * 10**6), (" 2GiB", 2**31)):
        assert hawk_compile.HawkConfig(image_cache=size).image_cache_bytes == expected
    assert hawk_compile.HawkConfig().image_cache_bytes is None
