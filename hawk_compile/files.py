"""Files that anybody may have written: read whole or refused, in bounded time and memory; and files that are written
whole or not at all.

Nothing but JSON, text and safetensors is read as data, and nothing that is read is run.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from hawk_compile.errors import HawkError, InputError

MOST_BYTES = 4 << 20
"""Of a file of settings or weights: those that are written here have some kilobytes."""
MOST_DIGITS = 19
"""Of a whole number: those of 64 bits."""

Refusal = type[HawkError]


def open_regular(path: "str | os.PathLike[str]", refusal: Refusal, what: str, most: int | None = None) -> int:
    """A descriptor of a regular file, to read.

    A pipe or a device is not waited for, nor read: reading would hang, or never end.

    Args:
        refusal, what: the error that is raised, and what it begins with: which argument, and what it must be.
        most: bytes.

    Raises:
        refusal: no file, none that may be read, no regular file, or one of more bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise refusal(f"{what}; there is no file {shown(path)}: correct the path") from None
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise refusal(f"{what}; {shown(path)} cannot be opened ({reason}): give another file") from None
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode):
        os.close(descriptor)
        raise refusal(f"{what}; there is no file {shown(path)}, which is a folder, a pipe or a device: give a file")
    if most is not None and seen.st_size > most:
        os.close(descriptor)
        raise refusal(
            f"{what}; {shown(path)} has {seen.st_size} bytes, and at most {most} are read: give another file"
        )
    return descriptor


def path_of(given: Any, argument: str) -> Path:
    """A path from what was given for an argument.

    Raises:
        InputError: it is none.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(
            f"{argument} must be a path, a text or an os.PathLike, got {type(given).__name__}: give a path"
        )
    return Path(given)


def shown(path: Any, most: int = 300) -> str:
    """A path for a message: on one line, and not longer than that."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}..."


@contextlib.contextmanager
def opened(
    path: "str | os.PathLike[str]", refusal: Refusal, what: str, most: int | None = None
) -> Iterator[BufferedReader]:
    """A regular file to read from. Raises `refusal` as `open_regular` does, and where the file cannot be read."""
    with os.fdopen(open_regular(path, refusal, what, most), "rb") as file:
        try:
            yield file
        except OSError as error:
            raise refusal(f"{what}; {shown(path)} cannot be read ({error}): give another file") from None


def digest_of(path: "str | os.PathLike[str]", refusal: Refusal, what: str) -> str:
    """SHA-256 of a file of any size, in hexadecimal. Raises `refusal` as `opened` does."""
    with opened(path, refusal, what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: "str | os.PathLike[str]", refusal: Refusal, what: str, most: int = MOST_BYTES) -> bytes:
    """Raises `refusal` as `open_regular` does, and for a file that grows while it is read."""
    with opened(path, refusal, what, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise refusal(f"{what}; {shown(path)} has more than {most} bytes: give another file")
    return content


def read_lines(path: "str | os.PathLike[str]", refusal: Refusal, what: str, most: int) -> Iterator[bytes]:
    """The lines of a file of any size, each of at most so many bytes.

    Raises:
        refusal: as `open_regular` does, and for a line that is longer.
    """
    with opened(path, refusal, what) as file:
        for number, line in enumerate(iter(functools.partial(file.readline, most + 1), b""), 1):
            if len(line) > most:
                raise refusal(f"{what}; {shown(path)} line {number} has more than {most} bytes: give another file")
            yield line


def read_json(path: "str | os.PathLike[str]", refusal: Refusal, what: str, most: int = MOST_BYTES) -> Any:
    """What a file of JSON holds.

    Raises:
        refusal: as `open_regular`, or as `parse_json`.
    """
    return parse_json(read_bytes(path, refusal, what, most), refusal, f"{what}; {shown(path)}")


def parse_json(text: bytes | str, refusal: Refusal, whose: str, remedy: str = "give another file") -> Any:
    """JSON as its standard has it: no NaN, no infinity, no name twice in an object, no number that overflows.

    Raises:
        refusal: anything else, or what is nested too deep to be read; the message begins with `whose`.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(
            decoded, parse_constant=no_constant, parse_int=whole_number, parse_float=finite_number,
            object_pairs_hook=distinct,
        )  # fmt: skip
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:  # of JSON, of UTF-8, of the hooks here
        reason = shown(error, 200)
    raise refusal(f"{whose} is no JSON in UTF-8 ({reason}): {remedy}") from None


def no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def whole_number(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def finite_number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {shown(text, 40)} is too large")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the name {shown(name, 80)} stands twice")
        made[name] = value
    return made


def real_path(path: "str | os.PathLike[str]") -> Path:
    """What a path leads to, by all symbolic links.

    Raises:
        OSError: a name that no file can have.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # of a NUL in it
        raise OSError(errno.EINVAL, str(error)) from None


def write_whole(path: "str | os.PathLike[str]", text: str | Iterable[str]) -> None:
    """Write a text so that the file holds all of it, or what it held before; devices and pipes are written to as such.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    target, lines = real_path(path), [text] if isinstance(text, str) else text
    if target.exists() and not target.is_file():
        with target.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        return
    fresh = target.with_name(f".{target.name[:80]}-{secrets.token_hex(6)}")
    try:
        with fresh.open("x", encoding="utf-8") as file:
            file.writelines(lines)
        if target.exists():
            fresh.chmod(target.stat().st_mode & 0o777)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
