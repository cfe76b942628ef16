"""Models whose checks of placeholders, positions or layers stood in the way of one graph, each by what is special."""

from __future__ import annotations

import pytest
import torch

import hawk_compile
from hawk_compile.errors import InputError
from hawk_compile.tools.survey.checks import Check, settings, steps
from hawk_compile.tools.survey.tiny import build, prompt, read
from tests.tiny import FOLDER

CASES = [
    ("exaone4_5", steps),  # a place for position offsets, and positions that count like any other's
    ("step3p7", steps),  # experts in a loop over those that tokens have chosen
    ("hunyuan_vl", steps),  # a check by `if`; four positions a token
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_equals_the_plain_model_on_what_is_kept(name: str, check: Check) -> None:
    tiny = read(FOLDER / f"{name}.json")
    check(tiny, build(tiny))


@pytest.mark.parametrize("ratio", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_visual_tokens_that_are_masked_out(name: str, ratio: float) -> None:
    """They take no part, features of later layers neither: as in the plain model with what was removed masked out."""
    tiny = read(FOLDER / f"{name}.json")
    model, inputs = build(tiny), prompt(tiny, rows=2)
    rows, length = inputs["input_ids"].shape
    places = torch.arange(length).repeat(rows, 1)
    mask = torch.ones_like(places)
    mask[0, :4] = 0
    inputs |= {"attention_mask": mask, "position_ids": places.expand(3, -1, -1) if name == "qwen3_vl" else places}
    hawk_compile.optimize(model, **settings(tiny, ratio))
    with torch.no_grad():
        logits = model(**inputs).logits
        report = hawk_compile.report(model)
        hawk_compile.restore(model)
        kept = torch.stack([torch.isin(places[0], keep) for keep in report.keep_indices])
        expected = model(**{**inputs, "attention_mask": mask * kept}).logits
    assert report.kept_visual_tokens.lt(report.visual_tokens).all() == (ratio > 0)
    for row, keep in enumerate(report.keep_indices):
        torch.testing.assert_close(logits[row, -len(keep) :], expected[row, keep], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [None, hawk_compile.Adaptive()])
def test_every_visual_token_is_masked_out(budget: hawk_compile.Adaptive | None) -> None:
    """Of features of later layers none is left."""
    tiny = read(FOLDER / "qwen3_vl.json")
    model, inputs = build(tiny), prompt(tiny, rows=1)
    mask = (inputs["input_ids"] != model.config.image_token_id).long()
    inputs |= {"attention_mask": mask, "position_ids": torch.arange(mask.shape[1]).expand(3, 1, -1)}
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        hawk_compile.optimize(model, ratio=0.0 if budget else 0.5, budget=budget, backend="eager")
        logits = model(**inputs).logits[:, -1]
    assert hawk_compile.report(model).kept_visual_tokens.tolist() == [0]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_placeholder_of_what_was_not_given_is_text(ratio: float) -> None:
    tiny = read(FOLDER / "llava_onevision.json")
    model, inputs = build(tiny), prompt(tiny, rows=1)
    ids = inputs["input_ids"]
    ids[0, -2] = model.config.video_token_id
    with torch.no_grad():
        plain = model(**inputs).logits
        hawk_compile.optimize(model, ratio=ratio, backend="eager")
        logits = model(**inputs).logits
    report = hawk_compile.report(model)
    assert report.visual_tokens.tolist() == [int((ids == model.config.image_token_id).sum())]
    assert ids.shape[1] - 2 in report.keep_indices[0]
    assert torch.equal(logits, plain) == (ratio == 0)
    image = (ids == model.config.image_token_id).nonzero()[0, 1]
    ids[0, image] = 0  # as many placeholders as features again, of which one is a video's
    with pytest.raises(InputError, match="placeholders for visual tokens, but"):
        model(**inputs)


def test_hidden_states_that_the_configuration_asks_for() -> None:
    tiny = read(FOLDER / "llava.json")
    model, inputs = build(tiny), prompt(tiny, rows=1)
    hawk_compile.optimize(model, **settings(tiny, 0.5))
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        model.config.output_hidden_states = model.config.text_config.output_hidden_states = True
        asked = model(**inputs).hidden_states
        assert model(**inputs, output_hidden_states=False).hidden_states is None
    assert all(torch.equal(*pair) for pair in zip(asked, expected, strict=True))


def test_an_image_without_its_size_is_refused_by_name() -> None:
    tiny = read(FOLDER / "qwen2_vl.json")
    model, inputs = build(tiny), prompt(tiny, rows=2)
    inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
    inputs["pixel_values"] = inputs["pixel_values"][: int(inputs["image_grid_thw"].prod())]
    hawk_compile.optimize(model, **settings(tiny, 0.5))
    with torch.no_grad(), pytest.raises(InputError, match="placeholders of more images or videos than image_grid_thw"):
        model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_batch_of_embeddings_beside_pixels(name: str) -> None:
    """No ids say where images stand, and no positions: the model counts its own, the same for all rows."""
    tiny = read(FOLDER / f"{name}.json")
    model, inputs = build(tiny), prompt(tiny, rows=2)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    model.base_model.rope_deltas = None  # of the prompt that `build` tries the model with
    with torch.no_grad():
        plain = model(**inputs).logits
        hawk_compile.optimize(model, **settings(tiny, 0.0))
        assert torch.equal(model(**inputs).logits, plain)
        hawk_compile.optimize(model, **settings(tiny, 0.5))
        pruned = model(**inputs).logits
        for row in range(2):
            single = {key: value[row : row + 1] for key, value in inputs.items() if key == "inputs_embeds"}
            single |= {key: value for key, value in prompt(tiny, rows=[row]).items() if key != "input_ids"}
            torch.testing.assert_close(model(**single).logits, pruned[row : row + 1], atol=2e-5, rtol=1e-5)
