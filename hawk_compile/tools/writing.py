"""What must hold before results are written and drawn, checked before anything is measured."""

import importlib.util
import tempfile
from pathlib import Path

from hawk_compile.errors import InputError


def check_drawable() -> None:
    """Raises InputError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('a picture needs matplotlib, which is not installed: pip install "hawk-compile[plot]"')


def check_writable(folder: Path) -> None:
    """Make the folder, and see that a plot can be drawn, before anything is measured.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is missing.
    """
    check_drawable()
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Make the folder, and see that it can be written to.

    Raises:
        InputError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}): give another folder") from None
