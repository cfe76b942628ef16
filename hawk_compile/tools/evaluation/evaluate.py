"""`evaluate`: how many answers stay right when visual tokens are removed, by method and ratio, on the same questions.

Pictures are encoded once for all methods; every method and ratio then answers the same batches by `generate`, inside
the compiled graph that `optimize` makes. What is compared is paired: sample by sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.errors import ConfigError
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.runtime.api import report
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.wholes import pruned_part
from hawk_compile.settings.config import HawkConfig, check_at_least_1, make_config_of_ratios
from hawk_compile.tools.evaluation.asking import answer_scores, batches, encoded, prefill_seconds
from hawk_compile.tools.evaluation.methods import Cell, Methods, Selectable, cells_of, methods_of
from hawk_compile.tools.evaluation.metrics import Metric, metric_of, name_of, scored
from hawk_compile.tools.evaluation.result import Evaluation
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.evaluation.samples import read_samples
from hawk_compile.tools.evaluation.scored import Row
from hawk_compile.tools.switching import Switch, images_of, left_as_it_was


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    data: "str | PathLike[str] | Iterable[Any]",
    config: HawkConfig | None = None,
    *,
    ratios: Sequence[float] = (0.5, 0.6, 0.8, 0.9),
    selectors: "Selectable | Sequence[Selectable] | Methods" = "all",
    baseline: str = "hawk",
    metric: "str | Metric" = "exact_match",
    batch: int = 8,
    max_new_tokens: int = 16,
    limit: int | None = None,
    skip_bad: bool = False,
    progress: Listener = nobody,
    **settings: Any,
) -> Evaluation:
    """Answer every question without pruning and with every method at every ratio. The model is left as it was.

    Args:
        model: an image-text-to-text model, optimised or not; of an omni model, the part that is one is asked.
        processor: its processor, with a chat template.
        data: a JSON Lines file, records, a Hugging Face dataset, or "demo"; see
            `hawk_compile.tools.evaluation.samples`.
        config: the settings of all methods, of which `ratios` and `selectors` take the place of two, or
        **settings: these by name, as for `optimize`: head_weights, normalization, backend, ... With `image_cache`, or
            if the model has one, a picture that several questions are about is encoded once.
        ratios: fractions of visual tokens removed, each in [0, 1).
        selectors: as for `optimize`, one or several; "all" that have a name; or methods: label -> settings of
            `optimize`.
        baseline: the method that others are compared with, one of them.
        metric: "exact_match", "anls", "relaxed_accuracy", or a function (said, answers) -> [0, 1].
        batch: questions that are answered together.
        max_new_tokens: most tokens of an answer.
        limit: as for `read_samples`.
        skip_bad: go on without samples that cannot be used, and without those, for all methods, that the metric gives
            no number in [0, 1] for.
        progress: told how many answers have been scored, and what is left out.

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`; ConfigError also for numbers
            that cannot be, such as a batch of 0.
        InputError: samples that cannot be used, or a metric that gives no number in [0, 1].
    """
    model = pruned_part(model)
    check_model(model)
    settled = make_config_of_ratios(config, settings, ratios)
    methods = methods_of(selectors, settled)
    cells = cells_of(methods, ratios)
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens)):
        check_at_least_1(name, value)
    if baseline not in methods:
        raise ConfigError(f"baseline must be one of the methods {', '.join(methods)}, got {baseline!r}")
    score = metric_of(metric)
    samples = read_samples(data, limit=limit, skip_bad=skip_bad, warn=lambda line: progress(Progress(0, 0, line)))
    images = images_of(model, settled)
    scores = Scores(model, processor, cells, samples, score, max_new_tokens, skip_bad, images)
    with left_as_it_was(model) as switch:
        scores.measure(switch, batch, progress)
    total = len(cells) * len(samples)
    sound = scored(scores.values, samples, lambda line: progress(Progress(total, total, line)))
    unpruned, *rows = scores.rows(sound)
    return Evaluation(
        model=str(model.config.name_or_path or type(model).__name__),
        data=fspath(data) if isinstance(data, (str, PathLike)) else type(data).__name__,
        metric=name_of(metric),
        baseline=baseline,
        samples=[sample for sample, good in zip(samples, sound, strict=True) if good],
        visual=float(scores.visual[sound].mean()),
        unpruned=unpruned,
        rows=rows,
    )


@dataclass
class Scores:
    """What every cell's answers are worth.

    Attributes:
        values: [cells, N] float64, what the metric gives.
        kept: [cells, N] float64, visual tokens kept. visual: [N] float64, visual tokens.
        seconds: of a prefill, for each cell.
    """

    model: PreTrainedModel
    processor: Any
    cells: list[Cell]
    samples: list[Sample]
    metric: Metric
    max_new_tokens: int
    skip_bad: bool
    images: ImageCache | None

    def __post_init__(self) -> None:
        shape = (len(self.cells), len(self.samples))
        self.values, self.kept, self.visual = np.empty(shape), np.empty(shape), np.empty(shape[1])
        self.seconds: list[float] = []

    def measure(self, switch: Switch, batch: int, progress: Listener) -> None:
        """Let every cell answer all questions, a batch of them at a time."""
        parts = list(batches(self.samples, batch))
        done = 0
        progress(Progress(done, self.values.size))
        for number, places in enumerate(parts):
            inputs = encoded(self.model, self.processor, [self.samples[place] for place in places], self.images)
            for row in range(len(self.cells)):
                self.answer(switch, row, places, inputs)
                done += len(places)
                progress(Progress(done, self.values.size))
            if number == len(parts) // 2:  # pictures of a usual size
                self.seconds = prefill_seconds(self.model, inputs, [cell.timed for cell in self.cells], switch)

    def answer(self, switch: Switch, row: int, places: list[int], inputs: dict[str, Any]) -> None:
        switch(self.cells[row].config)
        samples = [self.samples[place] for place in places]
        self.values[row, places] = answer_scores(
            self.model, self.processor, inputs, samples, self.metric, self.max_new_tokens, self.skip_bad
        )
        if self.cells[row].config is not None:
            prefill = report(self.model)
            self.kept[row, places] = prefill.kept_visual_tokens.cpu()
            self.visual[places] = prefill.visual_tokens.cpu()

    def rows(self, sound: np.ndarray) -> list[Row]:
        """A row for each cell, of the samples [N] bool that all have a score for."""
        kept = [self.visual, *self.kept[1:]]
        return [
            Row(cell.method, cell.ratio, values[sound], float(tokens[sound].mean()), seconds)
            for cell, values, tokens, seconds in zip(self.cells, self.values, kept, self.seconds, strict=True)
        ]
