"""Positions by the rules of vLLM's own models, without weights. Needs vLLM: `make test-vllm`."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers as hf

from hawk_compile.serving.vllm.items import place_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

CONFIGS: dict[str, Any] = {
    "Qwen2VLForConditionalGeneration": hf.Qwen2VLConfig, "Qwen2_5_VLForConditionalGeneration": hf.Qwen2_5_VLConfig,
    "Qwen3VLForConditionalGeneration": hf.Qwen3VLConfig,
}  # fmt: skip
TEXT = 50
GRIDS = ((1, 8, 12), (1, 4, 4))
KEEP = 3


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    from vllm.model_executor.models.registry import ModelRegistry

    from hawk_compile.serving.vllm.model import pruned_class, rule_of_positions

    base = ModelRegistry.models[request.param].load_model_cls()
    made = rule_of_positions(pruned_class(base), CONFIGS[request.param](), plain=False)
    made.places = set()
    return made


def prompt(model: Any) -> tuple[list[int], list[int], list[Any]]:
    """(ids of a prompt of two pictures as it was, as it is now, its items)."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    image, whole, short, features = model.config.image_token_id, [TEXT] * 3, [TEXT] * 3, []
    for grid in GRIDS:
        place = place_of([image] * (grid[1] * grid[2] // 4), None)
        assert place is not None
        ids, _ = place.shortened(KEEP)
        data = {**place.item([], KEEP).fields(), "image_grid_thw": torch.tensor(grid)}
        elements = {name: MultiModalFieldElem(data=each, field=MultiModalBatchedField()) for name, each in data.items()}
        features.append(MultiModalFeatureSpec(
            data=MultiModalKwargsItem(elements), modality="image", identifier="",
            mm_position=PlaceholderRange(offset=len(short), length=len(ids)),
        ))  # fmt: skip
        whole += [*place.ids, TEXT, TEXT]
        short += [*ids, TEXT, TEXT]
    return whole, short, features


def test_of_text_are_those_of_the_whole_prompt(model: Any) -> None:
    whole, short, features = prompt(model)
    known, delta = model.get_mrope_input_positions(short, features)
    sides = [max(grid[1:]) // 2 for grid in GRIDS]
    text = [0, 1, 2, 3 + sides[0], 4 + sides[0], 5 + sum(sides), 6 + sum(sides)]
    assert known[:, torch.tensor(short) == TEXT].tolist() == [text] * 3
    assert delta == text[-1] + 1 - len(short) and len(whole) > len(short)


def test_of_an_item_are_those_of_the_whole_prompt(model: Any) -> None:
    """By what its encoder gets, counted from its start; in front of the engine, by all that is known."""
    from vllm.multimodal.inputs import PlaceholderRange

    from hawk_compile.serving.vllm.compat.model import at_the_start, lone_feature

    whole, _, features = prompt(model)
    at, moved = 3, []
    for feature, (_, high, wide) in zip(features, GRIDS, strict=True):
        moved.append(replace(feature, mm_position=PlaceholderRange(offset=at, length=high * wide // 4)))
        at += high * wide // 4 + 2
    found, _ = model.whole_positions(whole, moved)
    for feature in moved:
        place = place_of(feature.data["hawk_ids"].data.tolist(), feature.data["hawk_visual"].data)
        assert place is not None
        start, visual = feature.mm_position.offset, place.all_visual
        there = found[:, start : start + len(place.inner)] - int(found[0, start - 1]) - 1
        given = {name: [each.data] for name, each in feature.data.items()}
        for alone in (lone_feature(given, 0, visual), at_the_start(feature.data, "image", visual)):
            inner, extent = model.item_positions(alone, place)
            assert inner.equal(there) and extent == int(there.max()) + 1
