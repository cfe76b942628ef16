"""Sizes in bytes as people write them."""

import re
from typing import Any

from hawk_compile.errors import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(f"(\\d+(?:\\.\\d+)?) ?({'|'.join(UNITS)})", re.IGNORECASE)
"""A size in bytes as it is written: "256MB" are 256,000,000, "256MiB" 268,435,456."""


def bytes_in(name: str, value: Any) -> int:
    """A size in bytes: a number of them, or a number with its unit.

    Raises:
        ConfigError: it is neither, or none.
    """
    written = SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        size = int(float(written[1]) * UNITS[written[2].upper()]) if written else 0
    if size < 1:
        raise ConfigError(
            f'{name} must be a number of bytes, an int of at least 1 or a text such as "256MB" or "1GiB", or None for '
            f"nothing, got {value!r}"
        )
    return size
