"""What `hawk-compile evaluate` does, and what it prints."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hawk_compile.tools.checkpoints import read_for_tasks
from hawk_compile.tools.evaluation.demo import DEMO, MODEL, control_rows
from hawk_compile.tools.evaluation.evaluate import evaluate
from hawk_compile.tools.terminal import bar, fractions_of, names
from hawk_compile.tools.writing import check_writable


def evaluate_checkpoint(
    console: Console, checkpoint: Path, data: str, out: Path, *, ratios: str, selectors: str, dtype: str,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Evaluate a checkpoint folder, print the table and write it with JSON and a plot.

    Raises:
        InputError: a folder that is no checkpoint, an unknown dtype, or samples that cannot be used.
        ConfigError: ratios that are no numbers, or an unknown selector.
    """
    fractions = fractions_of(ratios)
    check_writable(out)
    model, processor = read_for_tasks(checkpoint, dtype, device)
    with bar(console, "answers") as told:
        found = evaluate(
            model, processor, data, ratios=fractions, selectors=names(selectors), progress=told,
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
