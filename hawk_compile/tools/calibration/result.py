"""What a calibration gives: weights of the heads, and the scores that they come from."""

import json
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hawk_compile.compat.models import COMMIT
from hawk_compile.errors import InputError
from hawk_compile.files import write_whole
from hawk_compile.tools.evaluation.statistics import interval


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
            write_whole(path, json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}): give another file") from None


def summary(
    model: PreTrainedModel, tables: dict[str, np.ndarray], about: dict[str, Any], date: str, seed: int
) -> Calibration:
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
            "sha256": about["datasets"][name], "questions": table.shape[1], "score": float(table[0].mean()),
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
        revision=getattr(model.config, COMMIT, None), date=date,
        versions=about["versions"],
    )  # fmt: skip
