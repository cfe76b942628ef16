"""What an evaluation gives: the scores of every method, which can write themselves down."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from hawk_compile.tools.evaluation import table
from hawk_compile.tools.evaluation.scored import Scored


@dataclass
class Evaluation(Scored):
    """Everything that `evaluate` measured, as a table, JSON and a plot."""

    def markdown(self) -> str:
        """A table of every ratio's methods, the best first, with intervals and p-values against the baseline."""
        return table.markdown(self)

    def write(self, folder: "str | PathLike[str]") -> list[Path]:
        """The table, JSON with the score of every sample, and a plot; see `hawk_compile.tools.evaluation.table`."""
        return table.write(self, Path(folder))
