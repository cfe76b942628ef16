"""What `hawk-compile evaluate` does, and what it prints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn

from hawk_compile.errors import ConfigError
from hawk_compile.progress import Listener, Progress
from hawk_compile.tools.checkpoints import read_for_tasks
from hawk_compile.tools.evaluation.demo import MODEL, control_rows
from hawk_compile.tools.evaluation.evaluate import evaluate
from hawk_compile.tools.evaluation.samples import DEMO
from hawk_compile.tools.evaluation.table import check_writable


def evaluate_checkpoint(
    console: Console, checkpoint: Path, data: str, out: Path, *, ratios: str, selectors: str, dtype: str,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Evaluate a checkpoint folder, print the table and write it with JSON and a plot.

    Raises:
        InputError: a folder that is no checkpoint, an unknown dtype, or samples that cannot be used.
        ConfigError: ratios that are no numbers, or an unknown selector.
    """
    check_writable(out)
    model, processor = read_for_tasks(checkpoint, dtype, device)
    with bar(console, "answers") as told:
        found = evaluate(
            model, processor, data, ratios=numbers(ratios), selectors=names(selectors), progress=told,
            **settings,
        )  # fmt: skip
    if data.split(":")[0] == DEMO:
        if checkpoint.resolve() == MODEL.resolve():
            found.rows += control_rows(model.cpu(), processor, found)
        else:
            console.print(f"without control rows: they are made for the shipped model, {MODEL}, alone")
    written = found.write(out)
    console.print(written[0].read_text(encoding="utf-8"), soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}")


@contextlib.contextmanager
def bar(console: Console, what: str) -> Iterator[Listener]:
    """A listener that draws a progress bar with the time left, and prints what it is told in words."""
    with Bar(*Bar.get_default_columns()[:-1], TimeRemainingColumn(), console=console) as shown:
        task = shown.add_task(what, total=None)

        def listen(now: Progress) -> None:
            if now.text:
                console.print(now.text)
            if now.total:
                shown.update(task, completed=now.done, total=now.total)

        yield listen


def numbers(given: str) -> list[float]:
    try:
        return [float(each) for each in given.split(",")]
    except ValueError:
        raise ConfigError(f"ratios must be numbers with commas between, such as 0.5,0.8, got {given!r}") from None


def names(given: str) -> "str | list[str]":
    return given if given == "all" else [each.strip() for each in given.split(",")]
