"""The command line: `hawk-compile demo`, `inspect`, `calibrate`, `evaluate`, `bench`, `show`, `export`,
`run`, `serve`, `survey`, `env` and `passes`.

What the user got wrong is said in one line on stderr, with exit code 2; `--debug` in front of a command shows its
traceback.
"""

from typing import Annotated

import typer

import hawk_compile
from hawk_compile.tools.commands import leave, look, measure
from hawk_compile.tools.commands.common import clear_errors, debugging

app = typer.Typer(
    name="hawk-compile",
    help="Visual-token pruning for vision-language models inside the compiled graph (HAWK, arXiv 2604.07812).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

COMMANDS = (
    measure.demo, look.inspect, measure.calibrate, measure.evaluate, measure.bench, look.show, leave.export, leave.run,
    leave.serve, measure.survey, look.env, look.passes,
)  # fmt: skip


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hawk-compile {hawk_compile.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """What stands before a command."""
    debugging.set(debug)


OTHERS_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
for command in COMMANDS:
    app.command(context_settings=OTHERS_ARGUMENTS if command is leave.serve else None)(clear_errors(command))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
