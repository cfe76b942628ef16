"""What `hawk-compile show` does, and what it prints."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hawk_compile.errors import InputError
from hawk_compile.settings.config import make_config
from hawk_compile.tools.checkpoints import read_for_tasks
from hawk_compile.tools.evaluation.sample import picture
from hawk_compile.tools.pictures.show import show
from hawk_compile.tools.terminal import bar
from hawk_compile.tools.writing import check_drawable


def show_checkpoint(
    console: Console, checkpoint: Path, image: Path, question: str, out: Path, *, max_new_tokens: int, dtype: str,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Ask a checkpoint about a picture, print both answers and write the picture of what was kept.

    Raises:
        InputError: a folder that is no checkpoint, a picture that cannot be read or drawn, or a file in no place.
    """
    make_config(None, settings)  # refuses what is out of range before anything is loaded
    opened = picture(image, "image")
    if not out.parent.is_dir():
        raise InputError(f"out must lie in a folder that exists, got {out}: make {out.parent}")
    check_drawable()
    model, processor = read_for_tasks(checkpoint, dtype, device)
    with bar(console, "heads") as told:
        seen = show(model, processor, opened, question, max_new_tokens=max_new_tokens, progress=told, **settings)
    seen.write(out)
    console.print(f"unpruned: {seen.unpruned}")
    console.print(f"pruned:   {seen.answer}   ({seen.kept.sum()} of {seen.kept.size} visual tokens kept)")
    console.print(f"written:  {out}")
