"""Calls timed in turns in one process, so that what else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """One thing to time.

    Attributes:
        column: what runs: 'eager', 'compiled', 'short', 'authors' (eager, pruned) or 'hawk'.
        ratio: fraction of visual tokens removed; None where nothing is.
        prepare: not timed; gives the function that is.
        repeats: how often that function does its work.
    """

    column: str
    ratio: float | None
    prepare: Callable[[], Callable[[], Any]]
    repeats: int = 1


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range."""

    median: float
    iqr: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], 0.0)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), high - low)


def seconds(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one piece of its work, the device's work included."""
    function = call.prepare()
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - started) / call.repeats


def in_turns(calls: Sequence[Call], rounds: int, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each call in each round."""
    found = [[seconds(call, device) for call in calls] for _ in range(rounds)]
    return list(zip(*found, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
