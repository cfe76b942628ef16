"""The tiny models of tests/architectures, of all kinds of decoders: hybrids, experts, latent and sparse attention.

A prompt is what the model's file describes, with pixels drawn anew and another number of other words behind it. It is
held to `hawk_compile.tools.survey`'s oracle: scores from what the plain model's attention compares, and the plain model
gathered in front of the layer that scores.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.runtime.api import optimize, report, restore
from hawk_compile.tools.survey import checks, scores
from hawk_compile.tools.survey.outcome import Unasked
from hawk_compile.tools.survey.prompts import (
    at_places_of,
    lengthened,
    padded,
    question_of,
    rows_in,
    visual_of,
)
from hawk_compile.tools.survey.tiny import Tiny, build, prompt
from tests.tiny import tiny

NAMES = (
    "qwen3_5", "aria", "qwen3_5.linear_first", "muse_spark", "lfm2_vl.conv_first", "qwen3_vl_moe", "nemotron_h_omni",
    "kimi_k25", "minicpmv4_6.linear_first", "llama4", "gemma4", "lfm3_vl", "ernie4_5_vl_moe", "hunyuan_vl",
    "mistral_large4.sparse", "glm4v_moe", "qwen4_exp", "phi4_multimodal", "video_llama_3", "step3p7",
    "gemma4_unified.small_window", "cohere2_vision", "granite4_vision", "paligemma.gemma2", "voxtral",
    "qwen3_5_moe", "llava.jamba", "ovis2",
)  # fmt: skip
"""Not Molmo 2: its indices of patches count over all images of a batch, of which a row drawn alone has few."""
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.9)


@st.composite
def calls(draw: Any, made: dict[str, Any]) -> dict[str, Any]:
    return {
        "row": draw(st.integers(0, rows_in(tiny(made["tiny"])) - 1)), "words": draw(st.integers(0, 7)),
        "seed": draw(st.integers(0, 999)), "ratio": draw(st.sampled_from(RATIOS)),
        "mode": draw(st.sampled_from(["selection", "steps", "steps", "batch"])),
    }  # fmt: skip


@lru_cache(maxsize=1)
def models(name: str) -> tuple[Tiny, PreTrainedModel, PreTrainedModel]:
    described = tiny(name)
    return described, build(described), build(described)


def hold(case: dict[str, Any]) -> int:
    """Prompts that were held.

    Raises:
        Wrong: of the survey.
        HawkError: a refusal.
    """
    described, plain, model = models(case["model"]["tiny"])
    call = case["call"]
    optimize(model, **checks.settings(described, call["ratio"]))
    torch.manual_seed(call["seed"])
    try:
        return batch(described, plain, model) if call["mode"] == "batch" else one(described, plain, model, call)
    except Unasked:
        return 0
    finally:
        restore(model)


def one(described: Tiny, plain: Any, model: Any, call: dict[str, Any]) -> int:
    inputs = drawn(described, plain, call)
    visual = visual_of(plain, inputs)
    question = question_of(visual)
    asked = {**inputs, "question_mask": question[None].long()}
    result = checks.generated(model, asked)
    record = report(result)
    removed = int((record.visual_tokens - record.kept_visual_tokens).sum())
    if record.scores is None or removed != int(visual.sum()) - kept(int(visual.sum()), call["ratio"]):
        raise checks.Wrong(f"{removed} of {int(visual.sum())} visual tokens removed: {record.reason}")
    keep, layer = record.keep_indices[0], record.scoring_layer
    if not removed:
        return 0
    if call["mode"] == "selection":
        expected = scores.scored(scores.compared(plain, inputs, layer), visual, question)
        checks.equal("scores", record.scores[0, visual].double(), expected, checks.ROUNDING)
        checks.best_kept(expected, torch.isin(visual.nonzero()[:, 0], keep))
    else:
        checks.steps_behind(plain, inputs, result, keep, layer)
    return 1


def kept(count: int, ratio: float) -> int:
    return max(1, -(-count * (100 - round(100 * ratio)) // 100))


def drawn(described: Tiny, plain: Any, call: dict[str, Any]) -> dict[str, Any]:
    inputs = prompt(described, rows=[call["row"]], seed=call["seed"])
    text = [number for number in inputs["input_ids"][0].tolist() if number not in placeholder_ids(plain)]
    draw = random.Random(call["seed"])
    return lengthened(inputs, [draw.choice(text) for _ in range(call["words"])])


def batch(described: Tiny, plain: Any, model: Any) -> int:
    """A padded batch is as its rows, in models of which that is so without us."""
    if rows_in(described) < 2:
        return 0
    inputs, rows = padded(described, plain)
    rows = [at_places_of(plain, inputs, row, single) for row, single in enumerate(rows)]
    try:
        checks.rows_alone(model, inputs, rows)
    except checks.Wrong:
        try:
            checks.rows_alone(plain, inputs, rows)
        except checks.Wrong as own:
            raise Unasked(f"the plain model's own padded rows are not as they are alone: {own}") from None
        raise
    return len(rows)
