"""What `show` gives: what pruning kept of a picture, and a drawing of it: kept tokens, scores, each head's own."""

import math
import textwrap
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from hawk_compile.errors import InputError
from hawk_compile.tools.dimming import dimmed
from hawk_compile.tools.writing import check_drawable

DIMMED = 0.25
"""The brightness of a removed token."""
COLUMNS = 8
"""Maps of heads side by side."""
LINE = 48
"""Characters of a title's line, of which a third of the figure's width has room for so many."""


@dataclass(frozen=True)
class Seen:
    """One question about one picture.

    Attributes:
        kept: [h, w] bool, of the picture's visual tokens.
        scores: [h, w] float, by which they were ranked.
        heads: [H, h, w] float, the score of each query head alone, as the selector normalises it and lets text vote.
        weights: [H] float, of the heads, as the selector used them.
        answer, unpruned: what the model says with and without pruning.
    """

    image: Image.Image
    question: str
    ratio: float
    selector: str
    kept: np.ndarray
    scores: np.ndarray
    heads: np.ndarray
    weights: list[float]
    answer: str
    unpruned: str

    def write(self, path: "str | PathLike[str]") -> None:
        """A PNG of the kept tokens, the scores, and each head's own.

        Raises:
            InputError: the file cannot be written, or matplotlib is missing.
        """
        draw(self, Path(path))


def draw(seen: Seen, path: Path) -> None:
    """Write a PNG.

    Raises:
        InputError: the file cannot be written, or matplotlib is missing.
    """
    check_drawable()
    from matplotlib.figure import Figure

    rows = math.ceil(len(seen.heads) / COLUMNS)
    figure = Figure(figsize=(12, 4.6 + 1.7 * rows), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[4.6, 1.7 * rows])
    above, below = (figure.add_subfigure(halves[row]) for row in range(2))
    kept, total = int(seen.kept.sum()), seen.kept.size
    titles = (
        (f'"{seen.question}"', f"unpruned: {seen.unpruned}"),
        (f"{kept} of {total} visual tokens kept", f"pruned: {seen.answer}"),
        (f"scores, {seen.selector}", f"ratio {seen.ratio:g}"),
    )
    pixels = np.asarray(seen.image.convert("RGB"))
    panels = above.subplots(1, 3)
    for axes, title, shown in zip(panels, titles, (pixels, dimmed(pixels, seen.kept, DIMMED), pixels), strict=True):
        axes.set_title("\n".join(textwrap.fill(part, LINE) for part in title), fontsize=11, parse_math=False)
        axes.set_anchor("N")  # the layout leaves room for a title above the place of the axes, not above the picture
        axes.axis("off")
        axes.imshow(shown)
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    panels[2].imshow(seen.scores, extent=extent, alpha=0.65, cmap="inferno")
    maps = list(below.subplots(rows, min(COLUMNS, len(seen.heads)), squeeze=False).flat)
    for axes in maps:
        axes.axis("off")
    for head, (axes, scores, weight) in enumerate(zip(maps, seen.heads, seen.weights, strict=False)):
        axes.set_title(f"head {head}: {weight:.2f}", fontsize=8)
        axes.imshow(scores, cmap="inferno")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written ({error}): give another file, ending in .png") from None
