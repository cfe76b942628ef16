"""What the commands of several tools share: lists that an option holds as text, and a progress bar."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeRemainingColumn

from hawk_compile.errors import ConfigError
from hawk_compile.progress import Listener, Progress
from hawk_compile.settings.config import check_ratio


@contextlib.contextmanager
def bar(console: Console, what: str) -> Iterator[Listener]:
    """A listener that draws a progress bar with the time left, and prints what it is told in words.

    The bar is there once a total is told: what is refused before leaves none behind.
    """
    shown = Bar(*Bar.get_default_columns()[:-1], TimeRemainingColumn(), console=console)
    task = shown.add_task(what, total=None)

    def listen(now: Progress) -> None:
        if now.text:
            console.print(now.text)
        if now.total:
            shown.start()
            shown.update(task, completed=now.done, total=now.total)

    try:
        yield listen
    finally:
        if shown.live.is_started:
            shown.stop()


def fractions_of(given: str) -> list[float]:
    """What --ratios holds.

    Raises:
        ConfigError: something else than fractions.
    """
    try:
        fractions = [float(part) for part in given.split(",")]
    except ValueError:
        raise ConfigError(f"--ratios must be numbers with commas between, such as 0.5,0.8, got {given!r}") from None
    for fraction in fractions:
        check_ratio(fraction, "each of --ratios is the fraction")
    return fractions


def names(given: str) -> "str | list[str]":
    return given if given == "all" else [each.strip() for each in given.split(",")]


def counts(given: str) -> list[int]:
    try:
        return [int(each) for each in given.split(",")]
    except ValueError:
        raise ConfigError(f"tokens must be whole numbers with commas between, like 576,1024, got {given!r}") from None
