"""`calibrate`: how important each query head of the scoring layer is, measured by leaving it out.

For each dataset and head: the mean over questions of (score with all heads - score without this one); below 0 counts
as 0; divided by the sum over heads. The weights are the mean over datasets, divided by its sum (HAWK, arXiv 2604.07812,
leaves open what leaving out means: see `ablation.py`).

Pictures are encoded once for all heads. Every finished batch is written to a progress file, from which a killed run
goes on. Processes that `accelerate launch` or `torchrun` started share the batches. The result is the same, byte for
byte, however often it was killed and however many processes there were, with as many threads in each (OMP_NUM_THREADS).
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hawk_compile.compat.models import attention_of
from hawk_compile.errors import ConfigError, InputError, UnsupportedModelError
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.handover import first_with_keys
from hawk_compile.runtime.wholes import pruned_part
from hawk_compile.settings.config import HawkConfig, check_at_least_1, make_config_of_ratios
from hawk_compile.tools.calibration.ablation import ABLATIONS, FUNCTION, SCORE
from hawk_compile.tools.calibration.batch import Batch, heads_of
from hawk_compile.tools.calibration.likelihood import LIKELIHOOD
from hawk_compile.tools.calibration.processes import Processes
from hawk_compile.tools.calibration.record import Record
from hawk_compile.tools.calibration.result import Calibration, summary
from hawk_compile.tools.evaluation.asking import batches
from hawk_compile.tools.evaluation.metrics import Metric, metric_of, name_of, scored
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.evaluation.samples import read_samples
from hawk_compile.tools.switching import images_of, left_as_it_was

OWN_PACKAGES = ("hawk-compile", "torch", "transformers")


def calibrate(
    model: PreTrainedModel,
    processor: Any,
    data: Any,
    config: HawkConfig | None = None,
    *,
    ablation: str = SCORE,
    metric: "str | Metric" = "exact_match",
    ratios: Sequence[float] = (0.6, 0.8, 0.9),
    batch: int = 8,
    heads_at_once: int = 1,
    max_new_tokens: int = 16,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    progress_file: "str | PathLike[str] | None" = None,
    progress: Listener = nobody,
    **settings: Any,
) -> Calibration:
    """Measure the importance of every query head of the scoring layer. The model is left as it was.

    In several processes all must call it, each with the same arguments and the model on its own device: all get the
    result; the main one alone tells `progress` and writes `progress_file`. They measure a batch each at a
    time, so that a kill costs no more than those under way.

    Args:
        model, processor: as for `evaluate`.
        data: questions, as for `evaluate`, or several sets of them: name -> questions.
        config: the settings that "score" prunes by, of which `ratios` and what is measured take the place of two, or
        **settings: these by name, as for `optimize`: backend, modalities, query, ...
        ablation: "score", "attention" or "output"; see `hawk_compile.tools.calibration.ablation`.
        metric: as for `evaluate`, or "likelihood": the mean log-likelihood of a right answer's tokens, which is far
            less noisy.
        ratios: fractions of visual tokens removed, over which "score" takes the mean; the others remove nothing.
        heads_at_once: heads that one forward leaves out ("attention", "output"), each in rows of its own: `batch` times
            as many rows, which need as much memory as a batch so large. Pictures are not encoded again.
        limit: questions of each dataset.
        seed: of the bootstrap.
        progress_file: where finished batches are kept; a file that is there already is gone on from.
        batch, max_new_tokens, skip_bad: as for `evaluate`.
        progress: told how many questions are done, and what is left out.

    Raises:
        ConfigError: an unknown ablation, metric or ratio.
        UnsupportedModelError: a model that cannot be pruned, or whose heads cannot be left out in this way.
        InputError: samples that cannot be used, a progress file of something else, no head that matters, several
            processes without accelerate, or one of them that fails.
    """
    model = pruned_part(model)
    check_model(model)
    settled = settled_config(config, settings, ratios)
    check_attention(model, ablation)
    score = None if metric == LIKELIHOOD else metric_of(metric, LIKELIHOOD)
    check_numbers(ablation, batch, heads_at_once, max_new_tokens, seed)
    processes = Processes(model.device)
    tell = progress if processes.main else nobody
    sets = read_sets(data, limit, skip_bad, tell)
    images = images_of(model, settled)
    about = {
        "ablation": ablation, "metric": name_of(metric), "ratios": list(ratios) if ablation == SCORE else [],
        "batch": batch, "heads_at_once": heads_at_once, "max_new_tokens": max_new_tokens,
        "settings": described(settled), "skip_bad": skip_bad, "image_cache": images is not None,
        "model": str(model.config.name_or_path),
        "weights": fingerprint(model), "versions": {name: importlib.metadata.version(name) for name in OWN_PACKAGES},
        "datasets": {name: samples_digest(samples) for name, samples in sets.items()},
    }  # fmt: skip
    check_alike(processes.share({**about, "seed": seed}))
    record = Record(None if progress_file is None else Path(progress_file), about, processes)
    with left_as_it_was(model) as switch:

        def batch_of(samples: list[Sample]) -> Batch:
            return Batch(
                model, processor, samples, ablation, settled, ratios, score, max_new_tokens, heads_at_once, switch,
                skip_bad, images,
            )  # fmt: skip

        tables = measure(sets, batch, record, batch_of, heads_of(model), tell)
    total = sum(map(len, sets.values()))
    for name, table in tables.items():
        tables[name] = table[:, scored(table, sets[name], lambda line: tell(Progress(total, total, line)))]
    return summary(model, tables, about, record.date, seed)


def settled_config(config: HawkConfig | None, settings: dict[str, Any], ratios: Sequence[float]) -> HawkConfig:
    """The settings that "score" prunes by.

    Raises:
        ConfigError: settings out of range, or of which head weights are a part, which are what is measured.
    """
    made = make_config_of_ratios(config, settings, ratios)
    if "head_weights" in settings:
        raise ConfigError("head_weights are what calibrate measures: leave them out")
    return replace(made, head_weights=(1.0,))  # refused by selectors that weight all heads alike


def described(config: HawkConfig) -> dict[str, str]:
    """Every setting that may change a score, as text."""
    names = [setting.name for setting in fields(config) if setting.name not in ("ratio", "head_weights", "image_cache")]
    return {name: str(getattr(config, name)) for name in names} | {"selector": str(config.method)}


def check_numbers(ablation: str, batch: int, heads_at_once: int, max_new_tokens: int, seed: int) -> None:
    if ablation not in ABLATIONS:
        raise ConfigError(f"ablation must be one of {', '.join(ABLATIONS)}, got {ablation!r}")
    numbers = {"batch": batch, "max_new_tokens": max_new_tokens, "heads_at_once": heads_at_once}
    for name, value in numbers.items():
        check_at_least_1(name, value)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {seed!r}")
    if ablation == SCORE and heads_at_once > 1:
        raise ConfigError(
            f'heads_at_once must be 1 with ablation "{SCORE}", whose head weights are those of all rows, got '
            f"{heads_at_once}: leave it out"
        )


def check_attention(model: PreTrainedModel, ablation: str) -> None:
    """Heads are left out in SDPA's inputs and outputs, and masks are changed as they are made for it."""
    attention = attention_of(model.config.get_text_config())
    if ablation != SCORE and attention != FUNCTION:
        raise UnsupportedModelError(
            f'ablation="{ablation}" leaves heads out of scaled_dot_product_attention, and {type(model).__name__} uses '
            f'attn_implementation="{attention}": call model.set_attn_implementation("{FUNCTION}") first, or give '
            f'ablation="{SCORE}"'
        )


def read_sets(data: Any, limit: int | None, skip_bad: bool, tell: Listener) -> dict[str, list[Sample]]:
    """Every dataset by name; one that stands alone is called by its file, or "data"."""
    if isinstance(data, Mapping) and not data:
        raise InputError("data must hold at least one dataset, got an empty mapping")
    named = isinstance(data, (str, PathLike))
    sets = dict(data) if isinstance(data, Mapping) else {fspath(data) if named else "data": data}
    return {
        name: read_samples(one, limit=limit, skip_bad=skip_bad, warn=lambda line: tell(Progress(0, 0, line)))
        for name, one in sets.items()
    }


def measure(
    sets: dict[str, list[Sample]], size: int, record: Record, batch_of: Callable[[list[Sample]], Batch], heads: int,
    tell: Listener,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The scores [1 + heads, N] of every dataset, in batches of a size, those that the record holds already first."""
    parts = {
        f"{name}:{number}": (name, places)
        for name, samples in sets.items()
        for number, places in enumerate(batches(samples, size))
    }
    tables = {name: np.empty((1 + heads, len(samples))) for name, samples in sets.items()}
    done, total = 0, sum(map(len, sets.values()))
    tell(Progress(done, total))

    def measured(part: str) -> list[list[float]]:
        name, places = parts[part]
        return batch_of([sets[name][place] for place in places]).scores()

    for part in record.finished(list(parts), measured):
        name, places = parts[part]
        scores = np.array(record.scores[part], dtype=float)
        if scores.shape != (wanted := (1 + heads, len(places))):
            raise InputError(f"progress_file has scores {scores.shape} for {part}, which has {wanted}: remove it")
        tables[name][:, places] = scores
        done += len(places)
        tell(Progress(done, total))
    return tables


def check_alike(told: list[dict[str, Any]]) -> None:
    """Raises ConfigError unless all processes calibrate the same model on the same questions by the same settings."""
    for number, each in enumerate(told):
        if other := [name for name in each if each[name] != told[0][name]]:
            raise ConfigError(
                f"all processes must calibrate by the same arguments, got other {', '.join(other)} in process {number} "
                "than in process 0: give them the same"
            )


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of dtype, device and sums of the scoring layer's parameters: another checkpoint has others."""
    base: Any = model.base_model
    layer = base.get_decoder().layers[first_with_keys(model)]
    held = {name: total(value.detach()) for name, value in layer.named_parameters()}
    return hashlib.sha256(json.dumps([str(model.dtype), model.device.type, held]).encode()).hexdigest()


def total(value: Any) -> float:
    """The sum of a tensor's numbers, or of those of its parts where it is made of several, as quantised ones are."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(total(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return float(value.double().sum())


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of all questions, answers and pictures."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.question, sample.answers]).encode())
        for picture in sample.pictures():
            found.update(f"{picture.size}".encode() + picture.tobytes())
    return found.hexdigest()
