"""What `hawk-compile export` and `hawk-compile run` do, and what they print."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from hawk_compile.errors import ExportError, InputError
from hawk_compile.exporting.check import compare
from hawk_compile.exporting.folder import check_free
from hawk_compile.exporting.runner import load
from hawk_compile.exporting.write import export
from hawk_compile.tools.checkpoints import prompt, read_for_tasks, read_processor
from hawk_compile.tools.evaluation.sample import picture

QUESTION = "What is in this picture?"
EXPORTED, CHECKED = (320, 448), ((448, 320), (384, 384), (448, 512))
"""Height and width of the picture that shows how a model is called, and of those that check the result."""


def export_checkpoint(
    console: Console, checkpoint: Path, out: Path, *, dtype: str, check: bool, overwrite: bool, **settings: Any
) -> None:
    """Export a checkpoint folder; with `check`, compare the result with PyTorch on prompts of other sizes.

    Raises:
        InputError: a folder that is no checkpoint or is in the way, or an unknown dtype.
        ExportError: the check failed.
    """
    check_free(out, overwrite, "OUT", "--overwrite")
    model, processor = read_for_tasks(checkpoint, dtype, None)
    started = time.perf_counter()
    sample = prompt(processor, [Image.fromarray(noise(*EXPORTED))], QUESTION)
    manifest = export(
        model, sample, out, processor=processor, overwrite=overwrite, progress=lambda now: console.print(now.text),
        **settings,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"{out}: {manifest.format}, {size / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s")
    if check:
        prompts = [prompt(processor, [Image.fromarray(noise(*each))], QUESTION) for each in CHECKED]
        found = compare(load(out), model, prompts)
        console.print(
            f"check: {found.same_ids} of {found.rows} prompts have the ids of PyTorch, {found.same_kept} its kept "
            f"tokens; largest logit difference {found.logits:.2g}"
        )
        if not found.whole:
            raise ExportError(f"{out} does not answer as PyTorch does: see the line above; do not deploy it")


def run_export(
    console: Console, folder: Path, image: list[Path], question: str, *, ratio: float | None, tokens: int
) -> None:
    """Ask an exported model about pictures, and print its answer, the tokens it kept and the time it took.

    Raises:
        InputError: a picture that cannot be read, or an export without its processor.
    """
    pictures = [picture(path, "--image") for path in image]
    runner = load(folder)
    processor = read_processor(folder)
    if not pictures:
        typer.echo("warning: no --image was given: the question is asked without a picture", err=True)
    inputs = prompt(processor, pictures, question)
    started = time.perf_counter()
    out = runner.generate(**inputs, ratio=ratio, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - started
    console.print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    report = runner.report()
    console.print(f"{report.reason}; {report.kept_tokens} of {report.prompt_tokens} tokens, {seconds:.2f} s")


def sizes_of(given: list[str]) -> dict[str, Any]:
    """{"prompt": (16, 512, 2048)} of ["prompt=16:512:2048"]."""
    found = {}
    for each in given:
        name, _, values = each.partition("=")
        try:
            found[name] = tuple(int(value) for value in values.split(":"))
        except ValueError:
            raise InputError(f"size must be NAME=MINIMUM:USUAL:MAXIMUM in whole numbers, got {each!r}") from None
    return found


def noise(height: int, width: int) -> np.ndarray:
    """A picture [height, width, 3] of uniform noise; the same every time."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
