"""A server that leaks, for `tests.serving.load --control leak`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

BYTES = 20 * 2**10
"""Of each request: 20 MiB of a thousand."""

held: list[bytes] = []


class Leak:
    """In front of a server, as its `--middleware`: something of every request stays."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        held.append(b"1" * BYTES)
        await self.app(scope, receive, send)
