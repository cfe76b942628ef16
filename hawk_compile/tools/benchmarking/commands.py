"""What `hawk-compile bench` does, and what it prints."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from hawk_compile.errors import InputError
from hawk_compile.tools.absent import remedy
from hawk_compile.tools.benchmarking.bench import bench
from hawk_compile.tools.benchmarking.table import Table as Cells
from hawk_compile.tools.benchmarking.table import as_markdown, head, tables, write
from hawk_compile.tools.terminal import counts, fractions_of, names
from hawk_compile.tools.writing import check_writable

Found = TypeVar("Found")

UNBOUNDED = 10_000
"""Columns, of which a table takes what it needs."""


@dataclass(frozen=True)
class Command(Generic[Found]):
    """A benchmark as a command.

    Attributes:
        bench: measures a checkpoint folder or a profile.
        head, tables: what is shown of what it measured.
        write: all of that to a folder, which `check` has seen before anything is measured.
    """

    bench: Callable[..., Found]
    head: Callable[[Found], list[str]]
    tables: Callable[[Found], list[Cells]]
    write: Callable[[Found, Path], Sequence[Path]]
    check: Callable[[Path], None]

    def run(
        self, console: Console, checkpoint: Path | None, config: str | None, out: Path | None, *, ratios: str,
        markdown: bool, tokens: str | None = None, stages: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Benchmark a checkpoint folder or a profile, print the tables, and write them if a folder is given.

        Raises:
            as `bench`; ConfigError too for lists that hold something else than numbers.
            InputError: both a checkpoint and a profile, or a folder that cannot be written to.
        """
        source = source_of(checkpoint, config)
        settings["ratios"] = fractions_of(ratios)
        if out is not None:
            self.check(out)
        if stages is not None:
            settings["stages"] = names(stages)
        if tokens is not None:
            settings["tokens"] = counts(tokens)
        with console.status("") as status:
            found = self.bench(
                source, command=" ".join(["hawk-compile", *sys.argv[1:]]),
                progress=lambda now: status.update(now.text), **settings,
            )  # fmt: skip
        above, below = self.head(found), self.tables(found)
        if markdown:
            console.print(as_markdown(above, below), soft_wrap=True)
        else:
            show(console, above, below)
        if out is not None:
            console.print(f"written: {', '.join(map(str, self.write(found, out)))}")


def source_of(checkpoint: Path | None, config: str | None) -> Path | str:
    """Raises InputError for both a checkpoint and a profile, or for a folder that holds no checkpoint."""
    if checkpoint is not None and config is not None:
        raise InputError(f"give a checkpoint or a config, got both: {checkpoint} and {config}")
    if checkpoint is not None and not (checkpoint / "config.json").is_file():
        raise InputError(
            f"checkpoint must be a folder with a config.json, got {checkpoint}: {remedy(checkpoint)}; a profile: "
            "--config NAME"
        )
    return checkpoint or config or "small"


def show(console: Console, above: Sequence[str], below: Sequence[Cells]) -> None:
    for line in above:
        console.print(line)
    for about, headings, cells in below:
        shown = Table(box=None, pad_edge=False)
        for heading in headings:
            shown.add_column(heading, justify="right", overflow="fold")
        for each in cells:
            shown.add_row(*each)
        console.print()
        console.print(about)
        print_table(console, shown)


def print_table(console: Console, table: Table) -> None:
    """A table, as wide as its cells where no terminal's width bounds it."""
    width = console.width
    if not console.is_terminal:
        console.width = UNBOUNDED
    console.print(table)
    console.width = width


COMMAND = Command(bench, head, tables, write, check_writable)
