"""What a misspelt name was meant to be."""

import difflib
from collections.abc import Iterable
from typing import Any


def meant(given: Any, known: Iterable[str]) -> str:
    """A question to end an error with, ": did you mean 'x'?"; empty where no name is near, or none was given."""
    if not isinstance(given, str):
        return ""
    names = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(given.lower(), names, n=1)
    return f": did you mean {names[nearest[0]]!r}?" if nearest else ""
