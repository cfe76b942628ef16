"""A picture of a scene with the kept visual tokens shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hawk_compile.tools.demo.scenes import TOKEN, Scene

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
        sheet.paste(Image.fromarray(dimmed(panel)), (left, GAP + CAPTION))
        left += panel.scene.size[1] + GAP
    return sheet


def dimmed(panel: Panel) -> np.ndarray:
    """uint8 [height, width, 3]."""
    image = panel.scene.image
    if panel.kept is None:
        return image
    rows, columns = (side // TOKEN for side in panel.scene.size)
    brightness = np.full(rows * columns, DIM)
    brightness[panel.kept] = 1
    by_pixel = brightness.reshape(rows, columns).repeat(TOKEN, 0).repeat(TOKEN, 1)
    return (image * by_pixel[:, :, None]).astype(np.uint8)


def write(panels: Sequence[Panel], out: Path) -> None:
    """Write the panels as a PNG; the folder is made if it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels).save(out, format="PNG")
