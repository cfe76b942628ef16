"""A padded batch equals its rows run alone, and with ratio 0 an optimised model is the plain one, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile
from tests import zoo
from tests.marks import slow
from tests.runtime.models import MAIN, ROUNDING, generate, new_tokens, plain, prompt, pruned
from tests.zoo import Row, rows

TILES = tuple(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "smolvlm"))
LAYOUTS = ("qwen3_vl", *slow("qwen2_5_vl", "gemma3"), *TILES)
"""One architecture of each way to hand images over, and of each kind of mask."""


def mixed(name: str) -> list[Row]:
    """One image, another with other text, two images, none."""
    one, other = zoo.sizes(name)[0], zoo.sizes(name)[4]
    return [one, other, Row(images=one.images + other.images, after=2), Row(after=4)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_batch_equals_its_rows(name: str) -> None:
    model = pruned(name)
    batch = rows.encoded(plain(name), prompt(name, *mixed(name)))
    singles = [rows.row(plain(name), batch, i) for i in range(4)]
    out = generate(model, fresh(batch), 6)
    report = hawk_compile.report(model)
    counts = report.visual_tokens.tolist()
    assert len({*counts}) >= 3 and counts[3] == 0
    for i, single in enumerate(singles):
        alone = generate(model, fresh(single), 6)
        by_itself = hawk_compile.report(model)
        padding = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
        assert report.keep_indices[i].equal(by_itself.keep_indices[0] + padding)
        assert report.kept_visual_tokens[i] == by_itself.kept_visual_tokens[0]
        assert new_tokens(out, batch, i) == new_tokens(alone, single)
        for step, (together, apart) in enumerate(zip(out.logits, alone.logits, strict=True)):
            torch.testing.assert_close(together[i], apart[0], **ROUNDING, msg=lambda m, at=(i, step): f"{at}: {m}")


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """generate and forward write into the features they are given."""
    if "mm_encoder_outputs" not in inputs:
        return dict(inputs)
    outputs = {modality: type(output)(**output) for modality, output in inputs["mm_encoder_outputs"].items()}
    return {**inputs, "mm_encoder_outputs": outputs}


@pytest.mark.parametrize(
    "name",
    ["llava", *slow("gemma3", "qwen2_5_vl", "qwen3_vl"), *TILES],
)
def test_ratio_0_is_the_plain_model(name: str) -> None:
    """Bit for bit: a batch padded on the left through generate; a row, or through forward one padded on the right."""
    model = hawk_compile.optimize(pruned(name), ratio=0, backend="eager")
    try:
        for side in ("left", "right") if name in MAIN else ("left", None):
            inputs = prompt(name, *mixed(name), padding_side=side) if side else prompt(name, zoo.sizes(name)[4])
            if name in MAIN:
                with torch.no_grad():
                    found, expected = model(**inputs).logits, plain(name)(**inputs).logits
                real = inputs["attention_mask"].bool()
                assert found[real].equal(expected[real]), side
            if side != "right":
                out, wanted = generate(model, inputs, 4), generate(plain(name), inputs, 4)
                assert out.sequences.equal(wanted.sequences)
                assert all(a.equal(b) for a, b in zip(out.logits, wanted.logits, strict=True)), side
        assert hawk_compile.report(model).reason.startswith("ratio=0 leaves all")
    finally:
        hawk_compile.optimize(model, ratio=0.6, backend="eager")


@pytest.mark.parametrize("name", ["gemma3", *slow("llava", "qwen2_5_vl")])
def test_ratio_0_beams_are_the_plain_beams(name: str) -> None:
    model = hawk_compile.optimize(pruned(name), ratio=0, backend="eager")
    try:
        inputs = prompt(name, *mixed(name)[:2])
        options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
        out, wanted = generate(model, inputs, 5, **options), generate(plain(name), inputs, 5, **options)
        assert out.sequences.equal(wanted.sequences) and out.sequences_scores.equal(wanted.sequences_scores)
        options["use_cache"] = False  # beams find no cache to reorder then
        out, wanted = generate(model, inputs, 2, **options), generate(plain(name), inputs, 2, **options)
        assert out.sequences.equal(wanted.sequences) and out.past_key_values is None
    finally:
        hawk_compile.optimize(model, ratio=0.6, backend="eager")
