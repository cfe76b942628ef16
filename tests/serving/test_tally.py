"""The line a minute, and what the metrics count."""

from __future__ import annotations

import logging
import time

import pytest

from hawk_compile.serving.vllm import tally


class Total:
    """As prometheus_client's Counter."""

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int) -> None:
        self.value += amount


def until(caplog: pytest.LogCaptureFixture, lines: int) -> list[str]:
    stop = time.monotonic() + 10
    while len(caplog.messages) < lines and time.monotonic() < stop:
        time.sleep(0.01)
    return caplog.messages


def test_all_is_told_of_and_nothing_twice(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last items, after which none comes; and no line where nothing came."""
    monkeypatch.setattr(tally, "INTERVAL", 0.1)
    came, kept = Total(), Total()
    counts = tally.Tally(came, kept)
    with caplog.at_level(logging.INFO, "vllm.hawk"):
        counts.count(100, 20)
        counts.count(50, 50)
        assert until(caplog, 1) == ["hawk: 2 images and videos, 150 visual tokens came in, 70 were kept (0.47)"]
        time.sleep(0.3)
        assert len(caplog.messages) == 1
        counts.count(10, 1)
        assert until(caplog, 2)[1] == "hawk: 1 images and videos, 10 visual tokens came in, 1 were kept (0.10)"
    assert (came.value, kept.value) == (160, 71)


def test_what_came_last_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    counts = tally.Tally(Total(), Total())
    with caplog.at_level(logging.INFO, "vllm.hawk"):
        counts.count(100, 20)
        assert not caplog.messages
        counts.tell()
        counts.tell()
    assert len(caplog.messages) == 1


def test_processors_of_a_process_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in one process has several: each would write a line of its own, and keep itself until the end."""
    at_the_end: list[object] = []
    monkeypatch.setattr(tally, "counters", lambda: (Total(), Total()))
    monkeypatch.setattr(tally.atexit, "register", at_the_end.append)
    tally.of_process.cache_clear()
    try:
        shared = tally.of_process()
        assert tally.of_process() is shared and at_the_end == [shared.tell]
    finally:
        tally.of_process.cache_clear()
