"""`hawk-compile inspect`, `show`, `env` and `passes`: what is found, kept and installed."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hawk_compile.tools.commands.common import (
    AnswerTokens,
    Backend,
    Checkpoint,
    Device,
    Dtype,
    Ratio,
    Settings,
    console,
    rows,
    settings_of,
)


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, a config.json, or a model type such as llava.")],
    ratio: Ratio = 0.8,
    image_tokens: Annotated[int, typer.Option(help="Visual tokens of the prompt that numbers are given for.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Its other tokens.")] = 64,
    layers: Annotated[int, typer.Option(help="Decoder layers to capture; more take longer.")] = 2,
) -> None:
    """Show what the passes find in a model, from its configuration alone: no weights are loaded. Of a model type, what
    was tried and what works."""
    from hawk_compile.tools.survey.table import facts_of, read_types, tried

    if not path.exists() and len(path.parts) == 1:
        for survey in tried(read_types(), str(path)):
            console().print(rows(facts_of(survey)), "")
        return
    from hawk_compile.tools.inspection.inspect import inspect_model
    from hawk_compile.tools.inspection.words import in_words

    found = inspect_model(path, ratio=ratio, image_tokens=image_tokens, text_tokens=tokens, layers=layers)
    out = console()
    out.print(rows(in_words(found)))
    out.print()
    out.print("Gathered where the full prompt (S) becomes the pruned one (S'), V visual tokens becoming V':")
    gathered = Table(box=None, pad_edge=False)
    for heading in ("value", "shape", "along"):
        gathered.add_column(heading, overflow="fold")
    for each in found.gathered:
        gathered.add_row(each.name, f"[{', '.join(each.shape)}]" if each.shape else "a number", each.along)
    out.print(gathered)
    out.print()
    share = found.kept_tokens / found.prompt_tokens
    numbers = {
        "visual tokens": f"{found.visual_tokens} -> {found.kept_visual_tokens}   (ratio {found.ratio:g})",
        "prompt tokens": f"{found.prompt_tokens} -> {found.kept_tokens}   ({share:.3f} of them)",
    }
    if found.flops is not None and found.kept_flops is not None:
        work = f"{found.flops / 1e9:,.1f} -> {(found.kept_flops + found.scoring_flops) / 1e9:,.1f} GFLOP"
        numbers["decoder prefill"] = f"{work}   ({found.flop_ratio:.3f}; the score is {found.scoring_flops / 1e9:,.2f})"
    else:
        numbers["decoder prefill"] = "FLOPs unknown: this decoder does not run on the meta device"
    out.print(rows(numbers))


def show(
    checkpoint: Checkpoint,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    ratio: Ratio = 0.8,
    selector: Annotated[str, typer.Option(help="How visual tokens are ranked.")] = "hawk",
    tokens: AnswerTokens = 64,
    dtype: Dtype = "fp32",
    device: Device = None,
    backend: Backend = "inductor",
    settings: Settings = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("hawk-show.png"),
) -> None:
    """Draw what pruning keeps of a picture for a question, the scores, and each head's own."""
    from hawk_compile.tools.pictures.commands import show_checkpoint

    show_checkpoint(
        console(), checkpoint, image, question, out, max_new_tokens=tokens, dtype=dtype, device=device,
        **{"ratio": ratio, "selector": selector, "backend": backend, **settings_of(settings)},
    )  # fmt: skip


def env(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint folder, config.json or model type: say what is found in it too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    report: Annotated[bool, typer.Option(help="Print the form of a bug report, with this filled in.")] = False,
) -> None:
    """Print what a bug report needs: versions, machine, backends and switches. Home folders and user names are left
    out, and so is each variable that may hold a secret."""
    from hawk_compile.tools.bug_report import about_model
    from hawk_compile.tools.bug_report import report as filled
    from hawk_compile.tools.environment import anonymous, describe

    facts = {name: anonymous(value) for name, value in (describe() | (about_model(model) if model else {})).items()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    elif report:
        typer.echo(filled("\n".join(f"{name}: {value}" for name, value in facts.items())))
    else:
        console().print(rows(facts))


def passes() -> None:
    """List the passes in the order they run, and the environment switches around them."""
    from hawk_compile.compile.pipeline import EXPORT_PASSES, PASSES, PORTABLE_PASSES, left_out
    from hawk_compile.tools.environment import SWITCHES

    skipped = left_out(PASSES)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "pass", "what it does", ""):
        table.add_column(heading, overflow="fold")
    for number, step in enumerate(PASSES, start=1):
        note = "left out now" if step.name in skipped else "optional" if step.optional else ""
        table.add_row(str(number), step.name, step.summary, note)
    for step in EXPORT_PASSES:
        if step not in PASSES:
            table.add_row("", step.name, step.summary, "ahead of them in exports")
    for step in PORTABLE_PASSES:
        table.add_row("", step.name, step.summary, "behind them in exports but aoti")
    out = console()
    out.print(table)
    out.print()
    out.print(rows(SWITCHES))
