"""`calibrate`: how important each query head of the scoring layer is, measured by leaving it out.

For each dataset and head: the mean over questions of (score with all heads - score without this one); below 0 counts
as 0; divided by the sum over heads. The weights are the mean over datasets, divided by its sum (HAWK, arXiv 2604.07812,
leaves open what leaving out means: see `ablation.py`).

Pictures are encoded once for all heads. Every finished batch is written to a progress file, from which a killed run
goes on: the result is the same, byte for byte.
"""

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hawk_compile import capture
from hawk_compile.calibration.ablation import ABLATIONS, LAYER, SCORE, ablated
from hawk_compile.calibration.likelihood import LIKELIHOOD, likelihoods
from hawk_compile.config import HawkConfig
from hawk_compile.errors import ConfigError, InputError
from hawk_compile.evaluation.evaluate import (
    answers,
    at_least_1,
    batches,
    checked,
    encoded,
    left_as_it_was,
    metric_of,
    name_of,
)
from hawk_compile.evaluation.metrics import Metric
from hawk_compile.evaluation.samples import Sample, read_samples
from hawk_compile.evaluation.statistics import interval
from hawk_compile.optimize import check_model

OWN_PACKAGES = ("hawk-compile", "torch", "transformers")


@dataclass(frozen=True)
class Head:
    """One head on one dataset: the mean drop of the score without it, with its 95 % interval (bootstrap)."""

    drop: float
    low: float
    high: float

    @property
    def above_noise(self) -> bool:
        return self.low > 0


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        weights: of every query head; they sum to 1. `optimize(model, head_weights=calibration.weights)`.
        datasets: by name, its SHA-256, its number of questions, the score with all heads, and every head.
        unsure: heads whose drop is above noise on no dataset.
    """

    weights: list[float]
    datasets: dict[str, dict[str, Any]]
    unsure: list[int]
    ablation: str
    metric: str
    ratios: list[float]
    seed: int
    model: str
    revision: str | None
    date: str
    versions: dict[str, str]

    def write(self, path: "str | PathLike[str]") -> None:
        """As JSON, which `head_weights=` takes.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}): give another file") from None


def calibrate(
    model: PreTrainedModel,
    processor: Any,
    data: Any,
    *,
    ablation: str = SCORE,
    metric: "str | Metric" = "exact_match",
    ratios: Sequence[float] = (0.6, 0.8, 0.9),
    batch: int = 8,
    max_new_tokens: int = 16,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    progress_file: "str | PathLike[str] | None" = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
    backend: str = "inductor",
) -> Calibration:
    """Measure the importance of every query head of the scoring layer. The model is left as it was.

    Args:
        model, processor: as for `evaluate`.
        data: questions, as for `evaluate`, or several sets of them: name -> questions.
        ablation: "score", "attention" or "output"; see `hawk_compile.calibration.ablation`.
        metric: as for `evaluate`, or "likelihood": the mean log-likelihood of a right answer's tokens, which is far
            less noisy.
        ratios: fractions of visual tokens removed, over which "score" takes the mean; the others remove nothing.
        limit: questions of each dataset.
        seed: of the bootstrap.
        progress_file: where finished batches are kept; a file that is there already is gone on from.
        backend: of `optimize`.
        batch, max_new_tokens, skip_bad, progress, warn: as for `evaluate`.

    Raises:
        ConfigError: an unknown ablation, metric or ratio.
        InputError: samples that cannot be used, a progress file of something else, or no head that matters.
    """
    check_model(model)
    if ablation not in ABLATIONS:
        raise ConfigError(f"ablation must be one of {', '.join(ABLATIONS)}, got {ablation!r}")
    if not ratios:
        raise ConfigError("ratios must hold at least one fraction in [0, 1), got none")
    for ratio in ratios:
        HawkConfig(ratio=ratio, backend=backend)
    score = None if metric == LIKELIHOOD else metric_of(metric)
    at_least_1("max_new_tokens", max_new_tokens)
    if isinstance(data, Mapping) and not data:
        raise InputError("data must hold at least one dataset, got an empty mapping")
    sets = dict(data) if isinstance(data, Mapping) else {fspath(data) if is_name(data) else "data": data}
    samples = {each: read_samples(given, limit=limit, skip_bad=skip_bad, warn=warn) for each, given in sets.items()}
    about = {
        "ablation": ablation, "metric": name_of(metric), "ratios": list(ratios) if ablation == SCORE else [],
        "batch": batch, "max_new_tokens": max_new_tokens, "backend": backend, "model": str(model.config._name_or_path),
        "weights": fingerprint(model), "versions": {each: importlib.metadata.version(each) for each in OWN_PACKAGES},
        "datasets": {each: digest(found) for each, found in samples.items()},
    }  # fmt: skip
    record = Record(None if progress_file is None else Path(progress_file), about)
    heads = int(model.config.get_text_config().num_attention_heads)
    runs: list[int | None] = [None, *range(heads)]
    total, done = sum(map(len, samples.values())), 0
    tables: dict[str, np.ndarray] = {}
    with left_as_it_was(model) as switch:
        for each, found in samples.items():
            tables[each] = np.empty((len(runs), len(found)))
            for number, places in enumerate(batches(found, batch)):
                part = [found[place] for place in places]

                def measured(part: list[Sample] = part) -> list[list[float]]:
                    run = Run(model, processor, part, ablation, list(ratios), score, max_new_tokens, backend, switch)
                    return [run.scores(head, heads) for head in runs]

                tables[each][:, places] = record.of(f"{each}:{number}", measured)
                done += len(part)
                progress(done, total)
    return summary(model, tables, samples, about, record.date, seed)


@dataclass
class Run:
    """One batch, encoded, and how it is scored."""

    model: PreTrainedModel
    processor: Any
    samples: list[Sample]
    ablation: str
    ratios: list[float]
    metric: Metric | None
    max_new_tokens: int
    backend: str
    switch: Callable[[float, Mapping[str, Any] | None], None]

    def __post_init__(self) -> None:
        self.inputs = encoded(self.model, self.processor, self.samples)
        placeholders = torch.tensor(capture.placeholder_ids(self.model), device=self.model.device)
        self.visual = torch.isin(self.inputs["input_ids"], placeholders)

    def scores(self, head: int | None, heads: int) -> list[float]:
        """The score of every sample without a head (None: with all)."""
        if self.ablation != SCORE:
            self.switch(0.0, None)
            with ablated(self.model, self.ablation, head, self.visual):
                return self.measured()
        weights = tuple(float(each != head) for each in range(heads))
        found = []
        for ratio in self.ratios:
            self.switch(ratio, {"head_weights": weights, "backend": self.backend})
            found.append(self.measured())
        return np.mean(found, axis=0).tolist()

    def measured(self) -> list[float]:
        if self.metric is None:
            return likelihoods(self.model, self.processor, self.inputs, self.samples)
        said = answers(self.model, self.processor, self.inputs, self.max_new_tokens)
        return [
            checked(self.metric(each, sample.answers), sample) for each, sample in zip(said, self.samples, strict=True)
        ]


class Record:
    """Finished batches in a file of JSON lines; the first line says of what."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        self.path, self.found = path, {}
        self.date = datetime.date.today().isoformat()
        if path is None:
            return
        if path.exists():
            earlier, *done = whole_lines(path)
            if {**earlier, "date": None} != {**json.loads(json.dumps(about)), "date": None}:
                raise InputError(
                    f"progress_file {path} belongs to a calibration with other settings, data or model: remove it, or "
                    "give another file"
                )
            self.date = earlier["date"]
            self.found = {line["batch"]: line["scores"] for line in done}
        text = [{**about, "date": self.date}, *({"batch": k, "scores": v} for k, v in self.found.items())]
        try:
            fresh = path.with_name(f"{path.name}.new")
            fresh.write_text("".join(json.dumps(line) + "\n" for line in text), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise InputError(f"progress_file {path} cannot be written ({error}): give another place") from None

    def of(self, batch: str, measure: Callable[[], list[list[float]]]) -> list[list[float]]:
        """A batch's scores [runs][samples]: from the file, or measured and written to it."""
        if batch not in self.found:
            self.found[batch] = measure()
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"batch": batch, "scores": self.found[batch]}) + "\n")
        return self.found[batch]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a progress file, what it is of first, but for a last one that was cut off.

    Raises:
        InputError: a file of something else.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        batches_whole = all({"batch", "scores"} <= each.keys() for each in found[1:])
        whole = batches_whole and {"ablation", "date"} <= found[0].keys()
    except (ValueError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"progress_file {path} holds no progress of a calibration: give another file")
    return found


def summary(
    model: PreTrainedModel, tables: dict[str, np.ndarray], samples: dict[str, list[Sample]], about: dict[str, Any],
    date: str, seed: int,
) -> Calibration:  # fmt: skip
    """Weights and intervals from the scores [1 + H, N] of each dataset."""
    datasets, shares, sure = {}, [], set()
    for name, table in tables.items():
        drops = table[0] - table[1:]  # [H, N]
        found = [interval(each, seed) for each in drops]
        heads = [Head(each.mean, each.low, each.high) for each in found]
        sure |= {number for number, head in enumerate(heads) if head.above_noise}
        kept = np.clip(drops.mean(1), 0, None)
        if kept.sum() > 0:
            shares.append(kept / kept.sum())
        datasets[name] = {
            "sha256": about["datasets"][name], "questions": len(samples[name]), "score": float(table[0].mean()),
            "heads": [{**asdict(head), "above_noise": head.above_noise} for head in heads],
        }  # fmt: skip
    if not shares:
        raise InputError(
            "leaving out a head lowers the score on no dataset, so there is nothing to weigh heads by: give more "
            'questions, metric="likelihood", or another ablation'
        )
    mean = np.mean(shares, axis=0)
    weights = mean / mean.sum()
    return Calibration(
        weights=[round(float(weight), 8) for weight in weights],
        datasets=datasets,
        unsure=[head for head in range(len(weights)) if head not in sure],
        ablation=about["ablation"], metric=about["metric"], ratios=about["ratios"], seed=seed, model=about["model"],
        revision=getattr(model.config, "_commit_hash", None), date=date,
        versions=about["versions"],
    )  # fmt: skip


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of dtype, device and sums of the scoring layer's parameters: another checkpoint has others."""
    base: Any = model.base_model
    layer = base.get_decoder().layers[LAYER]
    held = {name: float(value.detach().double().sum()) for name, value in layer.named_parameters()}
    return hashlib.sha256(json.dumps([str(model.dtype), model.device.type, held]).encode()).hexdigest()


def is_name(data: Any) -> bool:
    return isinstance(data, (str, PathLike))


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all questions, answers and pictures."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.question, sample.answers]).encode())
        for picture in sample.pictures():
            found.update(f"{picture.size}".encode() + picture.tobytes())
    return found.hexdigest()
