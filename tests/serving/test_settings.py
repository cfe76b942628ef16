"""The settings of a server: which there are, what they are refused with, and what tells items apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hawk_compile.errors import ConfigError
from hawk_compile.serving.settings import (
    TAKEN,
    check_request,
    digest,
    reads_question,
    serving_config,
    with_ratio,
    written,
)


def test_every_image_by_itself() -> None:
    config = serving_config({"ratio": 0.75, "min_per_image": 3})
    assert [config.floor(count) for count in (1, 8, 100)] == [1, 3, 25]


def test_a_selector_with_options_and_lists_from_json() -> None:
    config = serving_config({"selector": {"name": "idpruner", "importance": 0.3}, "modalities": ["image"]})
    assert config.method.name == "idpruner" and config.method.options == {"importance": 0.3}
    assert config.modalities == ("image",)


@pytest.mark.parametrize(("given", "message"), [
    (0.8, r"hawk must map names of settings to values, as \{\"ratio\": 0.8\}, got 0.8"),
    ({"ratio": 80}, r"ratio is the fraction .* got 80; to remove 80 %, give 0.8"),
    ({"rato": 0.8}, "hawk has no setting 'rato'; .*did you mean 'ratio'"),
    ({"budget": 3}, "budget cannot be set for a server: .*; leave it out of hawk"),
    ({"quota": "prompt"}, "quota cannot be set for a server"),
    ({"backend": "eager"}, "the engine compiles the model itself"),
    ({"selector": {"importance": 1}}, "selector must be a name, or hold one"),
    ({"selector": {"name": "idpruner", "weight": 1}}, "names 'weight' for selector \"idpruner\""),
    ({"selector": "haw"}, "selector must be one of .* got 'haw'"),
    ({"question": "oldest"}, "question must be one of newest, own, got 'oldest'"),
])  # fmt: skip
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serving_config(given)


def test_a_request_with_a_ratio_of_its_own() -> None:
    config = serving_config({"ratio": 0.8, "selector": "cdpruner"})
    assert with_ratio(config, 0.8) is config
    assert with_ratio(config, 0.5).ratio == 0.5 and with_ratio(config, 0).ratio == 0
    for ratio in (1.5, 1.0, 80, -1, "x", None, float("nan"), True):
        with pytest.raises(ConfigError, match=rf"hawk_ratio is the fraction of visual tokens removed .* got .?{ratio}"):
            with_ratio(config, ratio)


def test_a_request_has_a_ratio_and_nothing_else_of_ours() -> None:
    check_request({"hawk_ratio": 0.5, "size": 1})
    for name in ("ratio", "hawk", "hawk_ration", "hawk_selector", "Hawk_ratio", "HAWK_RATIO", "hawk-ratio", "Ratio"):
        with pytest.raises(ConfigError, match=rf"mm_processor_kwargs has {name}, which a request cannot set"):
            check_request({name: 0.5})
    check_request({"images_kwargs": {"size": 1, "ratio": 1}})
    with pytest.raises(ConfigError, match=r"mm_processor_kwargs has images_kwargs\.hawk_ratio, which"):
        check_request({"images_kwargs": {"hawk_ratio": 0.5}})


@pytest.mark.parametrize(("selector", "expected"), [
    ("hawk", True), ("hawk_each", True), ("idpruner", True), ("cdpruner", True), ("dart", True), ("divprune", False),
    ("norm", False), ("stride", False),
])  # fmt: skip
def test_which_selectors_read_a_question(selector: str, expected: bool) -> None:
    assert reads_question(serving_config({"selector": selector})) is expected


def test_another_file_of_head_weights_is_another_setting(tmp_path: Path) -> None:
    """Under the same name: a cache of another process may hold what its former content chose."""
    file = tmp_path / "weights.json"
    digests = set()
    for content in ("[1, 2]", "[2, 1]"):
        written.cache_clear()
        file.write_text(content)
        digests |= {digest(serving_config({"head_weights": str(file)})) for _ in range(2)}
    assert len(digests) == 2


def test_what_tells_items_apart() -> None:
    """Every setting by which other tokens may be kept, and nothing else."""
    same = [{}, {"ratio": 0.8}, {"selector": "hawk"}, {"question": "own"}, {"normalization": "l2"}, {"query": "mean"}]
    assert len({digest(serving_config(each)) for each in same}) == 1
    others = [
        {"ratio": 0.5}, {"min_per_image": 1}, {"head_weights": "uniform"}, {"head_weights": [1.0, 2.0]},
        {"head_weights": [1.0, 3.0]}, {"normalization": "softmax"}, {"selector": "uniform"}, {"query": "last"},
        {"selector": {"name": "idpruner", "importance": 0.3}}, {"selector": "idpruner"},
    ]  # fmt: skip
    assert len({digest(serving_config(each)) for each in [{}, *others]}) == 1 + len(others)
    numbers = [digest(serving_config({"head_weights": each})) for each in ([1.0, 2.0], torch.tensor([1.0, 2.0]))]
    assert numbers[0] == numbers[1]
    assert set(TAKEN) >= {name for each in others for name in each}
