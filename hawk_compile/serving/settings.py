"""The settings of a server: those of `HawkConfig` that make sense where items are pruned one by one."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from hawk_compile.errors import ConfigError, HeadWeightsError
from hawk_compile.files import digest_of
from hawk_compile.settings.closest import meant
from hawk_compile.settings.config import QUESTIONS, HawkConfig, check_choice, check_ratio
from hawk_compile.settings.head_weights import as_tensor
from hawk_compile.settings.selectors import selector_from_json

KEY = "hawk"
"""Where the settings stand in a checkpoint's configuration, as `--hf-overrides` puts them there."""

RATIO = "hawk_ratio"
"""A request's own ratio, among the keyword arguments of its processor."""

TAKEN = (
    "ratio", "min_per_image", "head_weights", "normalization", "modalities", "selector", "question", "query",
    "vision_end_token_id", "end_of_turn_token_id",
)  # fmt: skip

REFUSED = {
    "budget": "every image keeps a number of tokens that is known before it is encoded",
    "quota": 'every image is pruned by itself, as quota="image" has it',
    "bucket": "an engine makes batches of prompts of any length",
    "normalize_per": 'every image is scored by itself, as normalize_per="image" has it',
    "backend": "the engine compiles the model itself",
    "compile_decode": "the engine compiles the model itself",
    "compile_vision": "the engine compiles the model itself",
    "image_cache": "the engine keeps encoded images itself",
    "processor": "the server's own tokenizer says where users' texts stand",
    "selector_options": 'options stand beside the selector\'s name, as {"name": "idpruner", "importance": 0.3}',
}


def serving_config(given: Any) -> HawkConfig:
    """The settings that a configuration holds under `hawk`.

    Raises:
        ConfigError: no mapping, a name that is no setting of a server, or a value that is out of its range.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f'{KEY} must map names of settings to values, as {{"ratio": 0.8}}, got {given!r}')
    for name in given:
        if name in REFUSED:
            raise ConfigError(f"{name} cannot be set for a server: {REFUSED[name]}; leave it out of {KEY}")
        if name not in TAKEN:
            raise ConfigError(
                f"{KEY} has no setting {name!r}; a server's settings are {', '.join(TAKEN)}{meant(str(name), TAKEN)}"
            )
    check_choice("question", given.get("question", "own"), QUESTIONS)
    settings: dict[str, Any] = {
        name: tuple(each) if isinstance(each, list) else each for name, each in given.items() if name != "question"
    }
    if "selector" in settings:
        settings["selector"] = selector_from_json(settings["selector"])
    return HawkConfig(quota="image", **settings)


def by_own_turn(given: Mapping[str, Any]) -> bool:
    """Whether an image is scored by the text of its own turn, whatever is asked later, else by the newest user's text.

    An image whose question stays is the same item in each turn of a conversation, so that caches of prefixes hold it.
    """
    return given.get("question", "own") == "own"


def with_ratio(config: HawkConfig, ratio: Any) -> HawkConfig:
    """The settings of a request that asks for a ratio of its own."""
    check_ratio(ratio, f"{RATIO} is the fraction")
    return config if ratio == config.ratio else replace(config, ratio=ratio)


def check_request(kwargs: Mapping[str, Any]) -> None:
    """Refuse a request that would be pruned by another ratio than it asks for, under a name that nobody reads.

    Args:
        kwargs: of its processor.

    Raises:
        ConfigError: such a request.
    """
    paths = [(name, name) for name in kwargs if name != RATIO]
    scopes = [(scope, inner) for scope, inner in kwargs.items() if isinstance(inner, Mapping)]
    paths += [(f"{scope}.{name}", str(name)) for scope, inner in scopes for name in inner]
    for path, name in paths:
        if name.lower().startswith(KEY) or path.lower() == "ratio":
            raise ConfigError(
                f"mm_processor_kwargs has {path}, which a request cannot set: give a ratio of its own, as "
                f'{{"{RATIO}": 0.5}}; what else there is to set stands in hf_overrides when the server starts'
            )


def reads_question(config: HawkConfig) -> bool:
    """Whether what is kept depends on the question, so that each question about an image is another item."""
    method = config.method
    return method.ranking is None or method.reads("scores") or method.reads("question_mask")


def digest(config: HawkConfig) -> str:
    """What tells items apart that these settings prune otherwise; the same in every process."""
    method = config.method
    given = config.used_head_weights
    weights = written(str(given)) if isinstance(given, str | PathLike) else as_tensor(given).tolist()
    said = (
        config.ratio, config.min_per_image, method.name, dict(method.options), config.used_normalization,
        config.used_query, weights,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def written(weights: str) -> str:
    """A name of head weights, or what stands in their file when a process first asks: caches may outlive a server."""
    file = Path(weights)
    if not os.path.isfile(file):
        return weights
    return digest_of(file, HeadWeightsError, "head_weights must be a file of weights")
