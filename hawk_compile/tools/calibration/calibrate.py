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
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.runtime.checks import check_model
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.calibration.ablation import ABLATIONS, LAYER, SCORE
from hawk_compile.tools.calibration.batch import Batch, heads_of
from hawk_compile.tools.calibration.likelihood import LIKELIHOOD
from hawk_compile.tools.calibration.processes import Processes
from hawk_compile.tools.calibration.progress import Record
from hawk_compile.tools.calibration.result import Calibration, summary
from hawk_compile.tools.evaluation.evaluate import at_least_1, batches, left_as_it_was, metric_of, name_of, scored
from hawk_compile.tools.evaluation.metrics import Metric
from hawk_compile.tools.evaluation.samples import Sample, read_samples

OWN_PACKAGES = ("hawk-compile", "torch", "transformers")


def calibrate(
    model: PreTrainedModel,
    processor: Any,
    data: Any,
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
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
    backend: str = "inductor",
) -> Calibration:
    """Measure the importance of every query head of the scoring layer. The model is left as it was.

    In several processes all must call it, each with the same arguments and the model on its own device: all get the
    result; the main one alone tells `progress` and `warn` and writes `progress_file`. They measure a batch each at a
    time, so that a kill costs no more than those under way.

    Args:
        model, processor: as for `evaluate`.
        data: questions, as for `evaluate`, or several sets of them: name -> questions.
        ablation: "score", "attention" or "output"; see `hawk_compile.tools.calibration.ablation`.
        metric: as for `evaluate`, or "likelihood": the mean log-likelihood of a right answer's tokens, which is far
            less noisy.
        ratios: fractions of visual tokens removed, over which "score" takes the mean; the others remove nothing.
        heads_at_once: heads that one forward leaves out ("attention", "output"), each in rows of its own: `batch` times
            as many rows, which need as much memory as a batch so large. Pictures are not encoded again.
        limit: questions of each dataset.
        seed: of the bootstrap.
        progress_file: where finished batches are kept; a file that is there already is gone on from.
        backend: of `optimize`.
        batch, max_new_tokens, skip_bad, progress, warn: as for `evaluate`.

    Raises:
        ConfigError: an unknown ablation, metric or ratio.
        InputError: samples that cannot be used, a progress file of something else, no head that matters, several
            processes without accelerate, or one of them that fails.
    """
    check_model(model)
    if ablation not in ABLATIONS:
        raise ConfigError(f"ablation must be one of {', '.join(ABLATIONS)}, got {ablation!r}")
    if not ratios:
        raise ConfigError("ratios must hold at least one fraction in [0, 1), got none")
    for ratio in ratios:
        HawkConfig(ratio=ratio, backend=backend)
    score = None if metric == LIKELIHOOD else metric_of(metric, LIKELIHOOD)
    at_least_1("max_new_tokens", max_new_tokens)
    at_least_1("heads_at_once", heads_at_once)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number of at least 0, got {seed!r}")
    if ablation == SCORE and heads_at_once > 1:
        raise ConfigError(
            f'heads_at_once must be 1 with ablation "{SCORE}", whose head weights are those of all rows, got '
            f"{heads_at_once}: leave it out"
        )
    if isinstance(data, Mapping) and not data:
        raise InputError("data must hold at least one dataset, got an empty mapping")
    processes = Processes(model.device)
    warn = warn if processes.main else lambda line: None
    sets = dict(data) if isinstance(data, Mapping) else {fspath(data) if is_name(data) else "data": data}
    samples = {each: read_samples(given, limit=limit, skip_bad=skip_bad, warn=warn) for each, given in sets.items()}
    about = {
        "ablation": ablation, "metric": name_of(metric), "ratios": list(ratios) if ablation == SCORE else [],
        "batch": batch, "heads_at_once": heads_at_once, "max_new_tokens": max_new_tokens, "backend": backend,
        "skip_bad": skip_bad, "model": str(model.config._name_or_path), "weights": fingerprint(model),
        "versions": {each: importlib.metadata.version(each) for each in OWN_PACKAGES},
        "datasets": {each: digest(found) for each, found in samples.items()},
    }  # fmt: skip
    check_alike(processes.share({**about, "seed": seed}))
    record = Record(None if progress_file is None else Path(progress_file), about, processes)
    parts = {
        f"{each}:{number}": (each, places)
        for each, found in samples.items()
        for number, places in enumerate(batches(found, batch))
    }
    tables = {each: np.empty((1 + heads_of(model), len(found))) for each, found in samples.items()}
    total, done = sum(map(len, samples.values())), 0
    with left_as_it_was(model) as switch:

        def measured(name: str) -> list[list[float]]:
            each, places = parts[name]
            return Batch(
                model, processor, [samples[each][place] for place in places], ablation, ratios, score, max_new_tokens,
                backend, heads_at_once, switch, skip_bad,
            ).scores()  # fmt: skip

        for name in record.finished(list(parts), measured):
            each, places = parts[name]
            tables[each][:, places] = record.scores[name]
            done += len(places)
            if processes.main:
                progress(done, total)
    for each, table in tables.items():
        tables[each] = table[:, scored(table, samples[each], warn)]
    return summary(model, tables, about, record.date, seed)


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
