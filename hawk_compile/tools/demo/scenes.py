"""Scenes of handwritten digits and shapes, with questions about them.

A scene is a picture with a noisy background: handwritten digits, shapes and scribbles (distractors that no question
asks about), each in a colour of its own and a cell of 56 x 56 pixels, which is 2 x 2 visual tokens of a Qwen2.5-VL.
Within a scene no two digits and no two shapes share a class or a colour, so every question has exactly one answer; a
digit, a shape and a scribble may well share a colour.

    "red digit"  -> "7"         "blue shape"   -> "star"
    "color 7"    -> "red"       "color star"   -> "blue"

Everything here is a pure function of (split, index, size): the same scene on every machine. The splits share neither
handwritten digits nor scene seeds. The digits are those of UCI's "Optical Recognition of Handwritten Digits" (CC BY
4.0), 8 x 8 pixels, 1,797 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from hawk_compile.errors import InputError

SPLITS = ("train", "calibration", "tune", "test")
"""Their places are the codes stored with the digits and the first word of each scene's seed."""

COLORS = {
    "red": (225, 45, 45),
    "green": (50, 185, 65),
    "blue": (60, 95, 240),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (160, 60, 210),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
"""Name -> RGB, 0 to 255, before each object's own variation."""

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES = ((336, 336), (336, 448), (448, 336), (392, 392), (336, 420), (364, 392))
"""(height, width) in pixels, all multiples of 28: 144 to 196 visual tokens."""

TOKEN = 28
"""Side of the square that becomes one visual token, in pixels: patch size 14 times a spatial merge of 2."""
CELL = 2 * TOKEN
_SUPERSAMPLE = 2


@dataclass(frozen=True)
class SceneObject:
    """One thing in the picture. `name` is a digit, a shape or "" for a scribble; `box` is (left, top, right, bottom)
    in pixels."""

    kind: str
    name: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """`target` is the index, in the scene's objects, of the one object that has to be seen to answer."""

    text: str
    answer: str
    target: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 [height, width, 3], its objects, and every question that can be asked about it."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]
    split: str
    index: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]

    def pil(self) -> Image.Image:
        """The picture as the processor takes it."""
        return Image.fromarray(self.image)


@cache
def _digit_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8] with values 0 to 16, labels [1797], split codes [1797] (positions in `SPLITS`)."""
    data = load_file(Path(__file__).with_name("digits.safetensors"))
    return data["images"], data["labels"], data["splits"]


@cache
def digit_ids(split: str, digit: str) -> np.ndarray:
    """Which of the 1,797 handwritten digits show `digit` and belong to `split`, int64 [n]."""
    _, labels, splits = _digit_data()
    return np.flatnonzero((splits == SPLITS.index(split)) & (labels == int(digit)))


def _rotated(points: np.ndarray, degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _digit_mask(rng: np.random.Generator, digit: str, split: str, side: int) -> Image.Image:
    """A handwritten digit, slightly turned and slanted, as a mask ("L", 0 to 255) of side x side pixels."""
    images, _, _ = _digit_data()
    small = Image.fromarray(
        (images[rng.choice(digit_ids(split, digit))].astype(np.float32) * (255 / 16)).astype(np.uint8)
    )
    turn, slant = np.deg2rad(rng.uniform(-10, 10)), rng.uniform(-0.15, 0.15)
    scale = 8.8 / side  # a margin, so that turning cuts nothing off
    a, b = scale * np.cos(turn), scale * (np.sin(turn) + slant)
    d, e = -scale * np.sin(turn), scale * np.cos(turn)
    c, f = 4 - (a + b) * side / 2, 4 - (d + e) * side / 2  # the centre stays the centre
    return small.transform((side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)


def _shape_mask(rng: np.random.Generator, name: str, side: int) -> Image.Image:
    """A filled shape as a mask ("L", 0 to 255) of side x side pixels, turned by up to 12 degrees."""
    big = side * _SUPERSAMPLE
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    angles = np.arange(10) * 36 - 90
    if name in ("circle", "ring"):
        draw.ellipse((big * 0.08, big * 0.08, big * 0.92, big * 0.92), fill=255)
        if name == "ring":
            draw.ellipse((big * 0.3, big * 0.3, big * 0.7, big * 0.7), fill=0)
    else:
        if name == "square":
            points = np.array([[-0.74, -0.74], [0.74, -0.74], [0.74, 0.74], [-0.74, 0.74]])
        elif name == "diamond":
            points = np.array([[0, -0.95], [0.62, 0], [0, 0.95], [-0.62, 0]])
        elif name == "triangle":
            points = np.array([[0, -0.85], [0.85, 0.75], [-0.85, 0.75]])
        elif name == "star":
            radius = np.where(np.arange(10) % 2 == 0, 0.95, 0.4)
            points = np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], 1) * radius[:, None]
        elif name == "cross":
            w, o = 0.28, 0.85
            points = np.array(
                [
                    [-w, -o],
                    [w, -o],
                    [w, -w],
                    [o, -w],
                    [o, w],
                    [w, w],
                    [w, o],
                    [-w, o],
                    [-w, w],
                    [-o, w],
                    [-o, -w],
                    [-w, -w],
                ]
            )
        else:
            t = np.linspace(0, 2 * np.pi, 40)
            heart = [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))]
            points = np.stack(heart, 1) / 18
        pixels = (_rotated(points, rng.uniform(-12, 12)) + 1) * (big / 2)
        draw.polygon([(float(x), float(y)) for x, y in pixels], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _scribble_mask(rng: np.random.Generator, side: int) -> Image.Image:
    """A few crooked strokes as a mask ("L", 0 to 255) of side x side pixels."""
    mask = Image.new("L", (side, side))
    points = rng.uniform(0.1, 0.9, (int(rng.integers(4, 7)), 2)) * side
    ImageDraw.Draw(mask).line(
        [(float(x), float(y)) for x, y in points], fill=255, width=int(rng.integers(3, 6)), joint="curve"
    )
    return mask


def _background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Dark, cloudy and grainy, as an RGB image."""
    clouds = rng.uniform(20, 95, (height // TOKEN, width // TOKEN, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-18, 19, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def scene_size(split: str, index: int) -> tuple[int, int]:
    """The (height, width) that `make_scene` gives scene `index` unless told otherwise: the sizes take turns."""
    return SIZES[(index + SPLITS.index(split)) % len(SIZES)]


def lay_out(
    split: str, index: int, size: tuple[int, int] | None = None, few: bool = False
) -> tuple[tuple[int, int], tuple[SceneObject, ...]]:
    """What stands where in scene `index` of `split`, without drawing it: (height, width) and the objects.

    Args and errors are `make_scene`'s; `few` takes 2 or 3 digits and as many shapes instead of 5 to 8 of each.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {SPLITS}, got {split!r}")
    if index < 0:
        raise InputError(f"index must be 0 or more, got {index}")
    height, width = size or scene_size(split, index)
    if height % TOKEN or width % TOKEN or min(height, width) < 336:
        raise InputError(f"size must be (height, width), multiples of {TOKEN} and at least 336, got {(height, width)}")
    rng = np.random.default_rng([SPLITS.index(split), index])
    colors = list(COLORS)
    n_digits, n_shapes = (int(n) for n in (rng.integers(2, 4, 2) if few else rng.integers(5, 9, 2)))
    wanted: list[tuple[str, str, str]] = []
    for kind, names, count in (("digit", DIGITS, n_digits), ("shape", SHAPES, n_shapes)):
        chosen = zip(rng.permutation(names)[:count], rng.permutation(colors)[:count], strict=True)
        wanted += [(kind, str(name), str(color)) for name, color in chosen]
    wanted += [("scribble", "", str(color)) for color in rng.choice(colors, int(rng.integers(4, 9)))]

    # The cells' grid floats in what the size leaves over, so objects do not always start where a visual token does.
    rows, columns = height // CELL, width // CELL
    left0, top0 = int(rng.integers(0, width % CELL + 1)), int(rng.integers(0, height % CELL + 1))
    objects = []
    for (kind, name, color), cell in zip(wanted, rng.permutation(rows * columns), strict=False):
        side = int(rng.integers(46, CELL + 1))
        left = left0 + int(cell % columns) * CELL + int(rng.integers(0, CELL - side + 1))
        top = top0 + int(cell // columns) * CELL + int(rng.integers(0, CELL - side + 1))
        objects.append(SceneObject(kind, name, color, (left, top, left + side, top + side)))
    return (height, width), tuple(objects)


def all_questions(objects: tuple[SceneObject, ...]) -> tuple[Question, ...]:
    """Every question about a scene: two about each digit and shape, in the objects' order."""
    questions = []
    for target, thing in enumerate(objects):
        if thing.kind != "scribble":
            questions.append(Question(f"{thing.color} {thing.kind}", thing.name, target))
            questions.append(Question(f"color {thing.name}", thing.color, target))
    return tuple(questions)


def make_scene(split: str, index: int, size: tuple[int, int] | None = None, few: bool = False) -> Scene:
    """Draw scene `index` of `split`.

    Args:
        split: one of `SPLITS`; decides which handwritten digits can appear.
        index: any integer from 0; scene and questions are a function of (split, index, size, few).
        size: (height, width) in pixels, multiples of 28 and at least 336; None takes the size that is this index's
        turn. few: 2 or 3 digits and as many shapes instead of 5 to 8 of each.

    Raises:
        InputError: an unknown split, a negative index, or a size that breaks the rule.
    """
    (height, width), objects = lay_out(split, index, size, few)
    rng = np.random.default_rng([SPLITS.index(split), index, 1])
    image = _background(rng, height, width)
    for thing in objects:
        left, top, right, _ = thing.box
        if thing.kind == "digit":
            mask = _digit_mask(rng, thing.name, split, right - left)
        elif thing.kind == "shape":
            mask = _shape_mask(rng, thing.name, right - left)
        else:
            mask = _scribble_mask(rng, right - left)
        red, green, blue = (int(v) for v in np.clip(np.array(COLORS[thing.color]) + rng.integers(-15, 16, 3), 0, 255))
        image.paste((red, green, blue), (left, top), mask)
    return Scene(np.asarray(image), objects, all_questions(objects), split, index)


def pick_questions(split: str, count: int, per_scene: int = 4, start: int = 0) -> list[tuple[Scene, Question]]:
    """`count` questions, `per_scene` (10 at most) of each scene from scene `start` on, each about another object of
    the scene.

    Which ones is chosen at random, and the same each time. A scene's questions stand side by side.
    """
    if not 1 <= per_scene <= 10:
        raise InputError(f"per_scene must be 1 to 10 (every scene has 10 objects to ask about), got {per_scene}")
    pairs: list[tuple[Scene, Question]] = []
    index = start
    while len(pairs) < count:
        scene = make_scene(split, index)
        rng = np.random.default_rng([len(SPLITS), SPLITS.index(split), index])
        targets = rng.permutation(len(scene.questions) // 2)[:per_scene]
        pairs += [(scene, scene.questions[2 * int(target) + int(rng.integers(2))]) for target in targets]
        index += 1
    return pairs[:count]


def token_cover(box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """How much of each visual token `box` covers, 0 to 1: float64 [height / 28 * width / 28], row by row as the model
    sees them."""
    left, top, right, bottom = box
    height, width = size

    def overlap(low: int, high: int, length: int) -> np.ndarray:
        edges = np.arange(0, length, TOKEN)
        return np.clip(np.minimum(high, edges + TOKEN) - np.maximum(low, edges), 0, TOKEN) / TOKEN

    return np.outer(overlap(top, bottom, height), overlap(left, right, width)).reshape(-1)
