"""Which refusals a drawn case may meet: what their message says, and of which cases it is right.

Any other HawkError is a finding, as a wrong selection is: it refuses what is valid.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.fuzz.drawing import BOTH_WAYS

Case = dict[str, Any]


def seen_later_both_ways(case: Case) -> bool:
    """Whether a later turn brings images to a model whose images attend both ways."""
    return case["model"].get("name") in BOTH_WAYS and any(turn.get("images") for turn in case["call"].get("turns", ()))


def frames_with_ids_of_images(case: Case) -> bool:
    """Whether settings that are of an image meet a video whose features wait in the places of images."""
    call = case["call"]
    asked = bool(call.get("min_per_image")) or "image" in (call.get("quota"), call.get("normalize_per"))
    filmed = any(turn.get("video") for row in call["rows"] for turn in row["turns"])
    return asked and filmed and case["model"]["name"] == "glm4v"


def both_kinds_for_later_layers(case: Case) -> bool:
    """Whether images and a video meet in one call of a model that adds features to later layers."""
    turns = [turn for row in case["call"]["rows"] for turn in row["turns"]]
    both = any(turn.get("images") for turn in turns) and any(turn.get("video") for turn in turns)
    return both and case["model"]["name"] == "qwen3_vl"


def features_of_later_layers_exported(case: Case) -> bool:
    return "format" in case["model"] and case["model"]["name"] == "qwen3_vl"


LEGITIMATE: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (r"new images on a cache that already holds tokens cannot attend both ways", seen_later_both_ways),
    (r"prefill was exported for visual from 2 on, got 1", features_of_later_layers_exported),
    (r"image and video in one call", both_kinds_for_later_layers),
    (r"min_per_image, quota and normalize_per find the tokens", frames_with_ids_of_images),
)
"""(what the message begins with, of which cases it is right)."""


def name_of(error: Exception, case: Case) -> str | None:
    """What a legitimate refusal is counted as; None for one that is none."""
    text = str(error)
    for pattern, right in LEGITIMATE:
        if re.match(pattern, text) and right(case):
            return f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', text)[:160]}"
    return None
