"""One question about pictures, with its answers."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from hawk_compile.errors import InputError
from hawk_compile.files import opened, shown

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        images: paths of pictures, or the pictures.
        answers: all that count as right.
        kind: what is asked for.
        origin: where it stands, for messages.
    """

    images: tuple[Path | Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    origin: str = ""

    def pictures(self) -> list[Image.Image]:
        """The pictures in RGB.

        Raises:
            InputError: one that cannot be read.
        """
        return [picture(each, self.origin) for each in self.images]

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of the pictures, which are not decoded for it.

        Raises:
            InputError: one that cannot be read.
        """
        return [
            each.size if isinstance(each, Image.Image) else read(each, self.origin, size_of) for each in self.images
        ]


def picture(image: Path | Image.Image, origin: str) -> Image.Image:
    """A picture in RGB.

    Raises:
        InputError: no file, one of another kind, or one that cannot be read.
    """
    if isinstance(image, Image.Image):
        try:
            return image.convert("RGB")
        except Exception as error:
            raise unreadable(image, origin, error) from None
    return read(image, origin, lambda image: image.convert("RGB"))


Read = TypeVar("Read")


def read(path: Path, origin: str, take: Callable[[Image.Image], Read]) -> Read:
    """What is taken of a picture's file, while it is open."""
    if not os.path.lexists(path):
        raise InputError(f"{origin}: there is no image {shown(path)}: correct the path")
    with opened(path, InputError, f"{origin}: an image must be a file that is one") as file:
        try:
            with Image.open(file, formats=formats()) as image:
                return take(image)
        except Exception as error:  # decoders raise whatever the bytes of a file lead them to
            raise unreadable(path, origin, error) from None


def size_of(image: Image.Image) -> tuple[int, int]:
    return image.size


def unreadable(image: Any, origin: str, error: Exception) -> InputError:
    told = shown(str(error) or type(error).__name__, 200)
    return InputError(f"{origin}: {shown(image)} cannot be read as an image ({told}): replace it")


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats of pictures that the installed Pillow reads, of those that are pixels: some run other programs."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
