"""Pictures whose removed visual tokens are dark."""

import numpy as np


def dimmed(pixels: np.ndarray, kept: np.ndarray, brightness: float) -> np.ndarray:
    """The picture [height, width, 3] uint8, dark where tokens were removed.

    Args:
        kept: [rows, columns] bool, the grid of visual tokens that lies over the picture.
        brightness: of a removed token, in [0, 1].
    """
    sides = zip(pixels.shape[:2], kept.shape, strict=True)
    row, column = ((2 * np.arange(size) + 1) * count // (2 * size) for size, count in sides)  # of the pixel's middle
    light = np.where(kept, 1.0, brightness)[row[:, None], column]
    return (pixels * light[..., None]).astype(np.uint8)
