"""What a benchmark gives: all that was measured, which can write itself down."""

import os
from dataclasses import dataclass
from pathlib import Path

from hawk_compile.tools.benchmarking import table
from hawk_compile.tools.benchmarking.measured import Measured


@dataclass
class Benchmark(Measured):
    """Everything that `bench` measured, as tables, JSON and a plot."""

    def markdown(self) -> str:
        """Tables, with what they are tables of above them."""
        return table.markdown(self)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """bench.md, bench.json and bench.png in a folder.

        Raises:
            InputError: the folder cannot be written to, or matplotlib is missing.
        """
        return table.write(self, Path(folder))
