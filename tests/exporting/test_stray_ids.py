"""Ids that wait for features of a modality which a prompt does not hold are text, in an exported prefill too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.exporting.prefill import prefill_component, prune
from hawk_compile.settings.config import HawkConfig
from tests import zoo
from tests.marks import slow
from tests.runtime.models import ROUNDING

NAME = "qwen2_5_vl"
CONFIG = HawkConfig(ratio=0.5, backend="eager", head_weights="uniform")


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build(NAME, layers=1)


def prompt(model: Any, stray: bool) -> dict[str, Any]:
    """One image; the last token is a word, or an id that waits for a video."""
    inputs = zoo.inputs(NAME, model, rows=[zoo.Row(images=((4, 6),))])
    if stray:
        inputs["input_ids"][:, -1] = model.config.video_token_id
    return inputs


@pytest.mark.parametrize("exported_from_such", [False, *slow(True)])
@torch.no_grad()
def test_an_exported_prefill_takes_a_stray_id_for_text(model: Any, exported_from_such: bool) -> None:
    """As the optimised model does, whether the prompt of the export held one or not."""
    weights = torch.full((model.config.get_text_config().num_attention_heads,), 1.0)
    component = prefill_component(model, prompt(model, exported_from_such), CONFIG, weights / len(weights))
    graph = prune(component, CONFIG, portable=False).module
    given = prefill_component(model, prompt(model, stray=True), CONFIG, weights / len(weights)).sample
    found = graph(**given)
    with hawk_compile.pruned(model, CONFIG):
        expected = model(**prompt(model, stray=True), logits_to_keep=1)
    report = hawk_compile.report(expected)
    assert report.visual_tokens.item() == given["image_features"].shape[0] // 2
    assert found["keep"][0].tolist() == report.keep_indices[0].tolist()
    torch.testing.assert_close(found["logits"][:1], expected.logits[:, -1], **ROUNDING)


def test_an_encoder_counts_the_tokens_of_its_own_images(model: Any) -> None:
    counts = [encoder_components(model, prompt(model, stray))[0].visual for stray in (False, True)]
    assert counts[0] == counts[1] > 0
