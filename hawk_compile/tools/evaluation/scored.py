"""What an evaluation measured: the scores of every method at every ratio, question by question."""

from dataclasses import dataclass, field

import numpy as np

from hawk_compile.tools.evaluation.sample import Sample


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
class Scored:
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
