"""What `hawk-compile calibrate` does, and what it prints."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hawk_compile.tools.calibration.calibrate import calibrate
from hawk_compile.tools.calibration.processes import Processes, own_device
from hawk_compile.tools.calibration.result import Calibration
from hawk_compile.tools.checkpoints import read_for_tasks
from hawk_compile.tools.terminal import bar, fractions_of


def calibrate_checkpoint(
    console: Console, checkpoint: Path, data: list[str], out: Path, *, ratios: str, dtype: str, device: str | None,
    **settings: Any,
) -> None:  # fmt: skip
    """Calibrate a checkpoint folder, print every head and write the weights. Progress lies beside them until then.

    Of several processes only the main one prints and writes.

    Raises:
        InputError: a folder that is no checkpoint, an unknown dtype, or samples that cannot be used.
        ConfigError: ratios that are no numbers, or settings out of range.
    """
    fractions = fractions_of(ratios)
    model, processor = read_for_tasks(checkpoint, dtype, own_device(device))
    processes = Processes(model.device)
    if not processes.main:
        console = Console(quiet=True)
    progress_file = out.with_name(f"{out.name}.progress")
    with bar(console, "questions") as told:
        found = calibrate(
            model, processor, {name: name for name in data}, ratios=fractions, progress=told,
            progress_file=progress_file, **settings,
        )  # fmt: skip
    if processes.main:
        found.write(out)
        progress_file.unlink()
    console.print(table(found))
    if found.unsure:
        console.print(f"not above noise on any dataset: heads {', '.join(map(str, found.unsure))}")
    console.print(f"written: {out}")


def table(found: Calibration) -> Table:
    """Every head with its weight, and its drop on each dataset."""
    made = Table(box=None, pad_edge=False)
    for heading in ("head", "weight", *(f"drop of {found.metric}, {name}" for name in found.datasets)):
        made.add_column(heading, overflow="fold")
    for head, weight in enumerate(found.weights):
        measured = (each["heads"][head] for each in found.datasets.values())
        drops = (f"{each['drop']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})" for each in measured)
        made.add_row(str(head), f"{weight:.4f}", *drops)
    return made
