"""One question about pictures, with its answers."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hawk_compile.errors import InputError


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
        """Width and height of the pictures, which are not decoded for it."""
        found = []
        for each in self.images:
            if isinstance(each, Image.Image):
                found.append(each.size)
            else:
                with Image.open(each) as opened:
                    found.append(opened.size)
        return found


def picture(image: Path | Image.Image, origin: str) -> Image.Image:
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{origin}: there is no image {image}: correct the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # of what is in the file
        raise InputError(f"{origin}: {image} cannot be read as an image ({error}): replace it") from None
