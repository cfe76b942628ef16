"""Questions that are answered together: how they are batched, encoded, answered, scored and timed."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import fresh
from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.capture.modalities import read_for_positions
from hawk_compile.compat.models import positions_for
from hawk_compile.runtime.cached_images import encode
from hawk_compile.settings.config import HawkConfig, check_at_least_1
from hawk_compile.tools.benchmarking.timing import synchronize
from hawk_compile.tools.checkpoints import fit, prompts
from hawk_compile.tools.evaluation.metrics import Metric, checked
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.switching import Switch

ROUNDS = 5
"""Prefills of one batch that are timed, under all settings in turns."""


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Places of samples that are answered together: alike in their pictures, so that little is padded."""
    check_at_least_1("batch", size)

    def area(place: int) -> tuple[int, int]:
        sizes = samples[place].sizes()
        return len(sizes), sum(width * height for width, height in sizes)

    order = sorted(range(len(samples)), key=area)
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def encoded(
    model: Any, processor: Any, samples: Sequence[Sample], images: ImageCache | None = None
) -> dict[str, Any]:
    """The inputs of `generate` for a batch, padded on the left, its pictures encoded, unless they are kept already."""
    questions = [sample.question for sample in samples]
    inputs = fit(model, prompts(processor, [sample.pictures() for sample in samples], questions))
    with_positions = {**inputs, "position_ids": positions_for(model, inputs["input_ids"], inputs)}
    result = run_encoders(model, with_positions, functools.partial(encode, model, images))
    if "mm_token_type_ids" in read_for_positions(model):  # positions are known by now; elsewhere the mask is made of it
        result.pop("mm_token_type_ids", None)
    return result


def answers(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    out = model.generate(**fresh(inputs), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_scores(
    model: Any, processor: Any, inputs: dict[str, Any], samples: Sequence[Sample], metric: Metric, max_new_tokens: int,
    skip_bad: bool,
) -> list[float]:  # fmt: skip
    """What the metric gives each answer of an encoded batch; see `checked`."""
    said = answers(model, processor, inputs, max_new_tokens)
    return [checked(metric(text, sample.answers), sample, skip_bad) for text, sample in zip(said, samples, strict=True)]


@torch.no_grad()
def prefill_seconds(model: Any, inputs: dict[str, Any], configs: Sequence[HawkConfig], switch: Switch) -> list[float]:
    """Median seconds of a prefill of an encoded batch under each of several settings."""
    spent: list[list[float]] = [[] for _ in configs]
    for number in range(ROUNDS + 1):
        for config, times in zip(configs, spent, strict=True):
            switch(config)
            call = fresh(inputs)
            synchronize(model.device)
            started = time.perf_counter()
            model(**call, logits_to_keep=1)
            synchronize(model.device)
            if number:  # the first may compile
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in spent]
