"""`evaluate`: how many answers stay right when visual tokens are removed, by method and ratio, on the same questions.

Pictures are encoded once for all methods; every method and ratio then answers the same batches by `generate`, inside
the compiled graph that `optimize` makes. What is compared is paired: sample by sample.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import fresh
from hawk_compile.capture.modalities import read_for_positions
from hawk_compile.errors import ConfigError, InputError
from hawk_compile.runtime.api import optimize, report, restore
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.settings.config import make_config
from hawk_compile.settings.selectors import SELECTORS, RankingFunction, Selector, selector_of
from hawk_compile.tools.benchmarking.timing import synchronize
from hawk_compile.tools.checkpoints import fit, prompts
from hawk_compile.tools.evaluation.metrics import METRICS, Metric
from hawk_compile.tools.evaluation.samples import Sample, read_samples

UNPRUNED = "unpruned"
ROUNDS = 5
"""Prefills of one batch that are timed, of each method and ratio in turns."""

Methods = Mapping[str, Mapping[str, Any]]
"""Label -> settings of `optimize`, but for the ratio."""
Selectable = str | Selector | RankingFunction


@dataclass(frozen=True)
class Row:
    """One method at one ratio.

    Attributes:
        scores: [N] float64, what the metric gives each sample.
        kept: mean number of visual tokens kept; None where a choice was made outside of the graph.
        seconds: median time of a prefill of one batch, pictures encoded; None where none was timed.
    """

    method: str
    ratio: float
    scores: np.ndarray
    kept: float | None = None
    seconds: float | None = None


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        unpruned: the row of the model without pruning, at ratio 0.
        rows: every method at every ratio.
        baseline: the method that the others are compared with.
        visual: mean number of visual tokens of a prompt.
    """

    model: str
    data: str
    metric: str
    baseline: str
    samples: list[Sample]
    visual: float
    unpruned: Row
    rows: list[Row] = field(default_factory=list)

    def row(self, method: str, ratio: float) -> Row:
        return next(row for row in self.rows if (row.method, row.ratio) == (method, ratio))

    def markdown(self) -> str:
        """A table of every ratio's methods, the best first, with intervals and p-values against the baseline."""
        from hawk_compile.tools.evaluation.table import markdown

        return markdown(self)

    def write(self, folder: "str | PathLike[str]") -> list[Path]:
        """The table, JSON with the score of every sample, and a plot; see `hawk_compile.tools.evaluation.table`."""
        from hawk_compile.tools.evaluation.table import write

        return write(self, Path(folder))


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    data: "str | PathLike[str] | Iterable[Any]",
    *,
    ratios: Sequence[float] = (0.5, 0.6, 0.8, 0.9),
    selectors: "Selectable | Sequence[Selectable] | Methods" = "all",
    baseline: str = "hawk",
    metric: "str | Metric" = "exact_match",
    batch: int = 8,
    max_new_tokens: int = 16,
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Evaluation:
    """Answer every question without pruning and with every method at every ratio. The model is left as it was.

    Args:
        model: an image-text-to-text model, optimised or not.
        processor: its processor, with a chat template.
        data: a JSON Lines file, records, a Hugging Face dataset, or "demo"; see
            `hawk_compile.tools.evaluation.samples`.
        ratios: fractions of visual tokens removed, each in [0, 1).
        selectors: as for `optimize`, one or several; "all" that have a name; or methods: label -> settings of
            `optimize`.
        baseline: the method that others are compared with, one of them.
        metric: "exact_match", "anls", "relaxed_accuracy", or a function (said, answers) -> [0, 1].
        batch: questions that are answered together.
        max_new_tokens: most tokens of an answer.
        limit, warn: as for `read_samples`.
        skip_bad: as for `read_samples`; also leave out, for all methods, what the metric gives no number in [0, 1] for.
        progress: told how many answers of how many have been scored.
        **settings: of `optimize`, for all methods: head_weights, normalization, backend, ...

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`; ConfigError also for numbers
            that cannot be, such as a batch of 0.
        InputError: samples that cannot be used, or a metric that gives no number in [0, 1].
    """
    check_model(model)
    methods = methods_of(selectors, settings)
    ratios = checked_ratios(ratios, methods)
    at_least_1("max_new_tokens", max_new_tokens)
    if baseline not in methods:
        raise ConfigError(f"baseline must be one of the methods {', '.join(methods)}, got {baseline!r}")
    score = metric_of(metric)
    samples = read_samples(data, limit=limit, skip_bad=skip_bad, warn=warn)
    cells: list[tuple[str, float]] = [(UNPRUNED, 0.0), *((name, ratio) for name in methods for ratio in ratios)]
    scores = {cell: np.empty(len(samples)) for cell in cells}
    kept = {cell: np.empty(len(samples)) for cell in cells}
    done = 0
    seconds: dict[tuple[str, float], float] = {}
    with left_as_it_was(model) as switch:
        parts = list(batches(samples, batch))
        for number, places in enumerate(parts):
            part = [samples[place] for place in places]
            inputs = encoded(model, processor, part)
            for cell in cells:
                switch(cell[1], methods.get(cell[0]))
                for place, said in zip(places, answers(model, processor, inputs, max_new_tokens), strict=True):
                    scores[cell][place] = checked(score(said, samples[place].answers), samples[place], skip_bad)
                if cell[0] != UNPRUNED:
                    found = report(model)
                    kept[cell][places] = found.kept_visual_tokens.cpu()
                    kept[cells[0]][places] = found.visual_tokens.cpu()
                done += len(part)
                progress(done, len(cells) * len(samples))
            if number == len(parts) // 2:  # pictures of a usual size
                seconds = prefill_seconds(model, inputs, cells, methods, switch)
    sound = scored(np.stack(list(scores.values())), samples, warn)
    rows = [Row(*cell, scores[cell][sound], float(kept[cell][sound].mean()), seconds[cell]) for cell in cells]
    return Evaluation(
        model=str(model.config._name_or_path or type(model).__name__),
        data=fspath(data) if isinstance(data, (str, PathLike)) else type(data).__name__,
        metric=name_of(metric),
        baseline=baseline,
        samples=[sample for sample, good in zip(samples, sound, strict=True) if good],
        visual=float(kept[cells[0]][sound].mean()),
        unpruned=rows[0],
        rows=rows[1:],
    )


def methods_of(
    selectors: "Selectable | Sequence[Selectable] | Methods", settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Label -> settings, from selectors or ready ones."""
    if isinstance(selectors, Mapping):
        made = {label: {**settings, **own} for label, own in selectors.items()}
    else:
        made = {}
        named: Any = list(SELECTORS) if selectors == "all" else selectors
        single = isinstance(named, str) or not isinstance(named, Sequence)
        for method in map(selector_of, [named] if single else named):
            label = str(method)
            if label in made and made[label]["selector"] != method:
                raise ConfigError(f"selectors must have different names, got {label} twice: give one of them another")
            fixed = ("head_weights",) if method.head_weights else ()
            made[label] = {name: value for name, value in settings.items() if name not in fixed} | {"selector": method}
    if not made:
        raise ConfigError(f"selectors must name at least one of {', '.join(SELECTORS)}, got none")
    return made


def metric_of(metric: "str | Metric", *others: str) -> Metric:
    """A metric by name; `others` are names that the caller takes beside those here."""
    if callable(metric):
        return metric
    if not isinstance(metric, str) or metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join((*METRICS, *others))} or a function, got {metric!r}")
    return METRICS[metric]


def name_of(metric: "str | Metric") -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def checked_ratios(ratios: Sequence[float], methods: Methods) -> list[float]:
    """Each ratio once, all settings of all methods read before anything runs."""
    if not isinstance(ratios, Sequence):
        raise ConfigError(f"ratios must be a sequence of fractions in [0, 1), got {ratios!r}")
    if not ratios:
        raise ConfigError("ratios must hold at least one fraction in [0, 1), got none")
    for name, given in methods.items():
        if name == UNPRUNED or "ratio" in given:
            raise ConfigError(f'a method must not be called "{UNPRUNED}" nor set ratio, got {name!r}: {dict(given)}')
        for ratio in ratios:
            make_config(None, {"ratio": ratio, **given})
    return list(dict.fromkeys(ratios))


def at_least_1(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def checked(score: float, sample: Sample, skip_bad: bool) -> float:
    """The score of an answer; to be skipped, NaN."""
    if isinstance(score, (int, float, np.number)) and 0 <= score <= 1:  # which NaN is not
        return float(score)
    if skip_bad:
        return math.nan
    raise InputError(
        f"{sample.origin}: the metric must give a number in [0, 1], got {score!r}: mend the metric, or skip what it "
        "fails on (skip_bad, --skip-bad)"
    )


def scored(table: np.ndarray, samples: Sequence[Sample], warn: Callable[[str], None]) -> np.ndarray:
    """[N] bool: the samples that every line of a table of scores [..., N] has a score for.

    Raises:
        InputError: there is none.
    """
    sound = ~np.isnan(table).any(0)
    for sample, good in zip(samples, sound, strict=True):
        if not good:
            warn(f"skipped: {sample.origin}: the metric gives no number in [0, 1]")
    if not sound.any():
        raise InputError("the metric gives a number in [0, 1] for no sample in all its answers: mend the metric")
    return sound


@contextlib.contextmanager
def left_as_it_was(model: PreTrainedModel) -> "Iterator[Callable[[float, Mapping[str, Any] | None], None]]":
    """A function that sets ratio and method (None: no pruning), and keeps what it compiled; all is undone after it."""
    base: Any = model.base_model
    earlier, training = model.__dict__.get(RUNTIME), [each for each in model.modules() if each.training]
    deltas = getattr(base, "rope_deltas", None)
    compiled: dict[Any, Any] = {}

    def switch(ratio: float, settings: Mapping[str, Any] | None) -> None:
        restore(model)
        if settings is None:
            return
        # Ratio and head weights are inputs of the graph, all else may be part of it.
        key = tuple((name, str(value)) for name, value in sorted(settings.items()) if name != "head_weights")
        runtime = optimize(model, ratio=ratio, **settings).__dict__[RUNTIME]
        for each in compiled.values():
            runtime.take_compiled(each)
        compiled[key] = runtime

    model.eval()
    try:
        yield switch
    finally:
        restore(model)
        if earlier is not None:
            optimize(model, earlier.config).__dict__[RUNTIME] = earlier
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = deltas
        for module in training:
            module.training = True


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Places of samples that are answered together: alike in their pictures, so that little is padded."""
    at_least_1("batch", size)

    def area(place: int) -> tuple[int, int]:
        sizes = samples[place].sizes()
        return len(sizes), sum(width * height for width, height in sizes)

    order = sorted(range(len(samples)), key=area)
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def encoded(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The inputs of `generate` for a batch, padded on the left, its pictures encoded."""
    made = prompts(processor, [each.pictures() for each in samples], [each.question for each in samples])
    inputs = fit(model, made)
    with_positions = {**inputs, "position_ids": model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)}
    result = run_encoders(model, with_positions)
    if "mm_token_type_ids" in read_for_positions(model):  # positions are known by now; elsewhere the mask is made of it
        result.pop("mm_token_type_ids", None)
    return result


def answers(model: Any, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> list[str]:
    out = model.generate(**fresh(inputs), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def prefill_seconds(
    model: Any,
    inputs: dict[str, Any],
    cells: Sequence[tuple[str, float]],
    methods: Methods,
    switch: "Callable[[float, Mapping[str, Any] | None], None]",
) -> dict[tuple[str, float], float]:
    """Median seconds of a prefill by method and ratio. Without pruning: compiled as the others are, at ratio 0, and
    with a ranking that costs nothing."""
    spent: dict[tuple[str, float], list[float]] = {cell: [] for cell in cells}
    first = next(iter(methods.values()))
    plain = {"selector": "stride", **{name: first[name] for name in ("backend", "modalities") if name in first}}
    for number in range(ROUNDS + 1):
        for cell in cells:
            switch(cell[1], methods.get(cell[0], plain))
            call = fresh(inputs)
            synchronize(model.device)
            started = time.perf_counter()
            model(**call, logits_to_keep=1)
            synchronize(model.device)
            if number:  # the first may compile
                spent[cell].append(time.perf_counter() - started)
    return {cell: statistics.median(times) for cell, times in spent.items()}
