"""A picture of a scene with the kept visual tokens shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hawk_compile.tools.demo.scenes import TOKEN, Scene
from hawk_compile.tools.dimming import dimmed

GAP, CAPTION, DIM = 14, 44, 0.22
"""Pixels between panels, pixels for a caption, and the brightness of a removed token."""


@dataclass(frozen=True, eq=False)
class Panel:
    """A scene with a caption of two lines; `kept` holds indices of visual tokens, None shows the scene as it is."""

    scene: Scene
    caption: tuple[str, str]
    kept: np.ndarray | None = None


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side: kept tokens as they are, removed ones dark."""
    width = sum(panel.scene.size[1] + GAP for panel in panels) + GAP
    height = max(panel.scene.size[0] for panel in panels) + CAPTION + 2 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    left = GAP
    for panel in panels:
        for line, text in enumerate(panel.caption):
            pen.text((left, GAP + line * 20), text, fill="black", font=font)
        sheet.paste(Image.fromarray(shown(panel)), (left, GAP + CAPTION))
        left += panel.scene.size[1] + GAP
    return sheet


def shown(panel: Panel) -> np.ndarray:
    """uint8 [height, width, 3]."""
    if panel.kept is None:
        return panel.scene.image
    grid = np.zeros([side // TOKEN for side in panel.scene.size], dtype=bool)
    grid.flat[panel.kept] = True
    return dimmed(panel.scene.image, grid, DIM)


def write(panels: Sequence[Panel], out: Path) -> None:
    """Write the panels as a PNG; the folder is made if it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels).save(out, format="PNG")
