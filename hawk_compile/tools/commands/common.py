"""What commands share: options, errors in one line, and how things are printed."""

import functools
import json
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Ratio = Annotated[float, typer.Option(help="Fraction of visual tokens removed, in [0, 1).")]
Dtype = Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")]
Device = Annotated[str | None, typer.Option(help="As torch names it, such as cuda.")]
Backend = Annotated[str, typer.Option(help="What compiles the prefill: inductor, aot_eager or eager.")]
SkipBad = Annotated[bool, typer.Option(help="Go on without samples that cannot be used.")]
Batch = Annotated[int, typer.Option(help="Questions answered together.")]
AnswerTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE",
        help="Another setting of optimize, such as query=each or budget=0.9; may be given repeatedly.",
    ),
]  # fmt: skip


debugging: ContextVar[bool] = ContextVar("hawk_debugging", default=False)
"""Whether the traceback of an error is asked for."""

FRAMES = 20
"""Of the traceback of an error that nobody expected, so many innermost calls are shown, of each error in its chain."""


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what this package raises on purpose, and what the system refuses, into one line and exit code 2.

    What nobody expected is shown with the end of its traceback, and how to report it; the exit code is 1.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from hawk_compile.errors import HawkError

        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if debugging.get():
                raise
            if isinstance(error, (HawkError, OSError)):
                typer.echo(f"error: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(2) from None
            typer.echo("".join(traceback.format_exception(error, limit=-FRAMES)), err=True, nl=False)
            typer.echo(UNEXPECTED, err=True)
            raise typer.Exit(1) from None

    return guarded


UNEXPECTED = (
    "error: nobody expected this one. Please report it: `hawk-compile env --report` prints the form, and "
    "`hawk-compile --debug COMMAND ...` the whole traceback"
)


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """Settings by name from texts "name=value", in which a value is JSON or, where it is none, text.

    A budget is the share of the score that is kept, or an object with the fields of `Adaptive`; a selector is a name,
    or an object with its name and its options.

    Raises:
        ConfigError: a text of another form, no setting's name, or a budget or a selector that cannot be.
    """
    from hawk_compile.errors import ConfigError
    from hawk_compile.settings.budgets import Adaptive
    from hawk_compile.settings.config import check_names
    from hawk_compile.settings.selectors import selector_from_json

    settings: dict[str, Any] = {}
    for name, value in values_of(pairs).items():
        try:
            if name == "budget" and value is not None:
                value = Adaptive(**value) if isinstance(value, dict) else Adaptive(value)
            elif name == "selector":
                value = selector_from_json(value)
        except TypeError as error:
            raise ConfigError(f"set {name}={value} cannot be read ({error}): give what docs/settings.md says") from None
        settings[name] = tuple(value) if isinstance(value, list) else value
    check_names(settings)
    return settings


def values_of(pairs: list[str], option: str = "set") -> dict[str, Any]:
    """Values by name from texts "name=value", in which a value is JSON or, where it is none, text.

    Args:
        option: that holds them.

    Raises:
        ConfigError: a text of another form.
    """
    from hawk_compile.errors import ConfigError

    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option} must be NAME=VALUE, got {pair!r}")
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            values[name] = text
    return values


def rows(facts: dict[str, str]) -> Table:
    """Names and values side by side; long values are folded, not cut."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def console() -> Console:
    """Plain text: brackets are shapes here, not markup."""
    return Console(markup=False, highlight=False, emoji=False)
