"""The tiny models run, and their prompts have the layout that the other tests count on."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.zoo import Row, common

# V of an image of the given size, alone in its row; worked out by hand from the processors.
VISUAL_COUNTS = {
    "qwen2_vl": ((4, 6), 24),
    "qwen2_5_vl": ((4, 6), 24),
    "qwen3_vl": ((4, 6), 24),
    "llava": ((1, 1), 16),
    "llava_siglip": ((1, 1), 25),
    "llava_next": ((16, 30), 16 + 4 * (8 + 1)),  # a 16 x 32 canvas: 4 x 8 features, nothing cut off, one newline a row
    "llava_onevision": ((64, 60), 16 + 8 * (8 + 1)),  # 16 x 16 features are more than 4 tiles: scaled down to 8 x 8
    "internvl": ((2, 2), 5 * 9),
    "smolvlm": ((2, 2), 5 * 9),
    "idefics3": ((2, 2), 5 * 9),
    "gemma3": ((1, 1), 16),
    "paligemma": ((1, 1), 16),
    "mistral3": ((4, 6), 24),
    "glm4v": ((4, 6), 24),
}
VIDEO_COUNTS = {
    "qwen2_vl": ((3, 2, 2), 12),
    "qwen2_5_vl": ((3, 2, 2), 12),
    "qwen3_vl": ((3, 2, 2), 12),
    "llava_onevision": ((3, 1, 1), 3 * 4 + 1),
    "internvl": ((3, 1, 1), 3 * 9),
    "smolvlm": ((3, 1, 1), 3 * 9),
    "glm4v": ((3, 2, 2), 12),
}
FIXED_SIZE = ("llava", "llava_siglip", "gemma3", "paligemma")  # V varies with the number of images only


def batches(name: str) -> dict[str, list[Row]]:
    """One row; two rows of unequal V; two images in a row."""
    images = [row.images for row in zoo.sizes(name)]
    small, large = images[0], images[4]
    return {
        "one": [Row(images=large)],
        "unequal": [Row(images=small), Row(images=small + large, after=2)],
        "two images": [Row(images=small + large)],
    }


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_runs_and_generates(name: str) -> None:
    model = zoo.build(name)
    for label, rows in batches(name).items():
        inputs = zoo.inputs(name, model, rows=rows)
        logits = model(**inputs).logits
        assert logits.shape == (*inputs["input_ids"].shape, common.VOCAB), label
        assert logits.isfinite().all(), label
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert generated.shape == (len(rows), inputs["input_ids"].shape[1] + 3), label
        # The two ways compute the same, but with matrix products of other shapes.
        torch.testing.assert_close(
            logits[:, -1].gather(1, generated[:, -3:-2])[:, 0], logits[:, -1].max(-1).values, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_visual_counts(name: str) -> None:
    model = zoo.build(name, layers=2)
    size, visual = VISUAL_COUNTS[name]
    cases = [(Row(images=(size,)), visual)]
    if name in zoo.VIDEO_NAMES:
        video, visual = VIDEO_COUNTS[name]
        cases.append((Row(video=video), visual))
    for row, expected in cases:
        inputs = zoo.inputs(name, model, rows=[row])
        assert zoo.visual_mask(name, model, inputs).sum() == expected == zoo.visual_count(name, row)
        assert model(**inputs).logits.isfinite().all()  # the models check V against the features they compute


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_every_size_is_accepted(name: str) -> None:
    model = zoo.build(name, layers=2)
    shapes = set()
    for row in zoo.sizes(name):
        inputs = zoo.inputs(name, model, rows=[row])
        assert model(**inputs).logits.isfinite().all(), row
        shapes.add((zoo.visual_count(name, row), inputs["input_ids"].shape[1]))
    assert len(shapes) >= 10
    assert len({visual for visual, _ in shapes}) >= (3 if name in FIXED_SIZE else 9)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_equal_seeds_give_equal_models_and_inputs(name: str) -> None:
    first, second, other = zoo.build(name), zoo.build(name), zoo.build(name, seed=1)
    state = torch.get_rng_state()
    weights = [dict(model.named_parameters()) for model in (first, second, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not any(torch.equal(value, weights[2][key]) for key, value in weights[0].items())
    rows = batches(name)["unequal"]
    a, b, c = (zoo.inputs(name, first, rows=rows, seed=seed) for seed in (0, 0, 1))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["pixel_values"], c["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_special_ids_lie_in_the_vocabulary(name: str) -> None:
    model = zoo.build(name, layers=1)
    embeddings = model.get_input_embeddings().num_embeddings
    configs = [model.config, model.config.get_text_config()]
    ids = [
        (key, value)
        for config in configs
        for key, value in config.to_dict().items()
        if key.endswith(("token_id", "token_index")) and value is not None
    ]
    assert ids
    for key, value in ids:
        for one in value if isinstance(value, list) else [value]:
            assert 0 <= one < embeddings, key
    assert model.generation_config.pad_token_id == common.PAD
    assert model.generation_config.eos_token_id is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(side: str) -> None:
    model = zoo.build("qwen2_5_vl", layers=1)
    inputs = zoo.inputs("qwen2_5_vl", model, rows=[Row(), Row(after=9)], padding_side=side)
    mask = inputs["attention_mask"]
    assert mask.sum(1).tolist() == [12, 16]
    assert mask[0].tolist() == ([0] * 4 + [1] * 12 if side == "left" else [1] * 12 + [0] * 4)


def test_layout_of_a_chat_row() -> None:
    model = zoo.build("qwen2_5_vl", layers=1)
    row = Row(images=((1, 2), (1, 1)), before=2, after=3)
    signs = {
        common.START: "S",
        common.VISION_START: "<",
        common.IMAGE: "V",
        common.VISION_END: ">",
        common.END_OF_TURN: "E",
        common.TEMPLATE: "x",
        common.TEMPLATE + 1: "x",
    }
    ids = zoo.inputs("qwen2_5_vl", model, rows=[row])["input_ids"][0].tolist()
    assert "".join(signs.get(i, "t") for i in ids) == "Stt<VV>t<V>tttExx"


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_text_only(name: str) -> None:
    model = zoo.build(name, layers=2)
    inputs = zoo.text_only(name, model, tokens=5)
    assert not zoo.visual_mask(name, model, inputs).any()
    assert not any(key.startswith("pixel") for key in inputs)
    assert model(**inputs).logits.isfinite().all()


def test_errors_name_the_argument() -> None:
    model = zoo.build("llava", layers=1)
    with pytest.raises(ValueError, match="no architecture is called 'lava'"):
        zoo.build("lava")
    with pytest.raises(ValueError, match="takes no video"):
        zoo.inputs("llava", model, rows=[Row(video=(2, 2, 2))])
    with pytest.raises(ValueError, match="one image size"):
        zoo.inputs("llava", model, rows=[Row(images=((2, 2),))])
    with pytest.raises(ValueError, match="padding_side"):
        zoo.inputs("llava", model, rows=[Row()], padding_side="middle")
