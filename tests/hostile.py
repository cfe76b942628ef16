"""What stands in a file that somebody else has written, or that was cut off, where something of ours is expected."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.errors import HawkError

SECONDS = 10.0
"""That a refusal may take, however busy the machine is; none takes a tenth of that."""
MOST_OF_A_MESSAGE = 2000

NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n ",
    "cut off": b'{"weights": [1, 2',
    "other bytes": bytes(range(256)),
    "UTF-16": '{"weights": [1]}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf[1]",
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "NaN": b'{"weights": [NaN, 1, 1, 1]}',
    "Infinity": b'{"weights": [Infinity, 1, 1, 1], "parts": -Infinity}',
    "1e400": b'{"weights": [1e400, 1, 1, 1]}',
    "many digits": b"[" + b"9" * 100_000 + b"]",
    "many digits behind a point": b"[0." + b"9" * 1_000_000 + b"e" + b"9" * 1000 + b"]",
    "a name twice": b'{"weights": [1, 1, 1, 1], "weights": [0, 0, 0, 1]}',
    "two values": b"[1] [2]",
    "NUL": b'{"weights": "\x00"}',
}  # fmt: skip
"""What no reader may take."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**63, -(2**63), 1e308, -0.0, "", "x", "../x", "/etc/passwd", "a\0b", "..\\x", "C:\\x",
    "x" * 300, [], [[]], [None], [0], {}, {"": {}}, {"file": 1}, [1] * 1000, {"weights": {"x": 1}},
    {"engines": {"8.9": "x"}},
)  # fmt: skip
"""What may stand anywhere in JSON."""


def places(tmp_path: Path) -> dict[str, Path]:
    """Paths at which nothing can be read, or more than there is memory for."""
    there = {
        "a pipe": tmp_path / "pipe", "a folder": tmp_path / "folder", "nowhere": tmp_path / "nowhere",
        "a link to itself": tmp_path / "loop", "a huge file": tmp_path / "huge", "a link to a pipe": tmp_path / "to",
        "a long name": tmp_path / ("n" * 5000), "a NUL": Path(f"{tmp_path}/a\0b"), "zeros": Path("/dev/zero"),
        "random": Path("/dev/urandom"), "a terminal": Path("/dev/tty"), "memory": Path("/proc/self/mem"),
    }  # fmt: skip
    os.mkfifo(there["a pipe"])
    there["a folder"].mkdir()
    there["a link to itself"].symlink_to(there["a link to itself"])
    there["a link to a pipe"].symlink_to(there["a pipe"])
    with there["a huge file"].open("wb") as file:
        file.truncate(1 << 40)  # of nothing: it takes no room
    return there


@contextlib.contextmanager
def refused(error: type[HawkError] | tuple[type[HawkError], ...] = HawkError) -> Iterator[None]:
    """What runs inside is refused, in bounded time and with a message that can be read."""
    started = time.monotonic()
    with pytest.raises(error) as raised:
        yield
    assert time.monotonic() - started < SECONDS
    text = str(raised.value)
    assert len(text) < MOST_OF_A_MESSAGE and "\0" not in text, text[:500]
    assert any(each in text for each in (":", ";", "must be")), f"neither rule nor remedy: {text}"


def taken_or_refused(read: Callable[[], Any]) -> None:
    """Either something comes of it or a HawkError does, in bounded time."""
    started = time.monotonic()
    with contextlib.suppress(HawkError):
        read()
    assert time.monotonic() - started < SECONDS


def mutated(valid: bytes, draw: random.Random) -> bytes:
    """A file of which a part is other, missing, twice there, or cut off."""
    made = bytearray(valid)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        start = draw.randrange(len(made) + 1)
        stop = min(len(made), start + draw.choice((1, 1, 4, 40)))
        match draw.randrange(5):
            case 0:
                made[start:stop] = draw.randbytes(stop - start)
            case 1:
                del made[start:stop]
            case 2:
                made[start:start] = made[start:stop]
            case 3:
                del made[start:]
            case _:
                made[start:start] = draw.choice((b"[", b"}", b'"', b"1e999", b"NaN", b"null,", b"\0\xff", b"9" * 30))
    return bytes(made)


def other_value(content: Any, draw: random.Random) -> Any:
    """JSON of which one value is another, or a name is missing, new, or spelled otherwise."""
    copy = json.loads(json.dumps(content))
    spots: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
            spots.append((value, key))
            walk(value[key])

    walk(copy)
    holder, key = draw.choice(spots)
    change = draw.randrange(8)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[draw.choice(("__class__", "../x", "a\0b", "", "file", "x" * 500))] = holder.pop(key)
    else:
        holder[key] = draw.choice(VALUES)
    return copy
