"""What `hawk-compile show` does, and what it prints."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hawk_compile.errors import InputError
from hawk_compile.tools.checkpoints import read_for_tasks
from hawk_compile.tools.pictures.show import show
from hawk_compile.tools.terminal import bar
from hawk_compile.tools.writing import check_drawable


def show_checkpoint(
    console: Console, checkpoint: Path, image: Path, question: str, out: Path, *, dtype: str, device: str | None,
    **settings: Any,
) -> None:  # fmt: skip
    """Ask a checkpoint about a picture, print both answers and write the picture of what was kept.

    Raises:
        InputError: a folder that is no checkpoint, a picture that cannot be read or drawn, or a file in no place.
    """
    check_drawable()
    if not out.parent.is_dir():
        raise InputError(f"out must lie in a folder that exists, got {out}: make {out.parent}")
    model, processor = read_for_tasks(checkpoint, dtype, device)
    with bar(console, "heads") as told:
        seen = show(model, processor, image, question, progress=told, **settings)
    seen.write(out)
    console.print(f"unpruned: {seen.unpruned}")
    console.print(f"pruned:   {seen.answer}   ({seen.kept.sum()} of {seen.kept.size} visual tokens kept)")
    console.print(f"written:  {out}")
