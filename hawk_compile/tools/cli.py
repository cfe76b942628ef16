"""The command line: `hawk-compile demo`, `inspect`, `calibrate`, `evaluate`, `bench`, `show`, `export`,
`run`, `env` and `passes`.

What the user got wrong is said in one line on stderr, with exit code 2.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="hawk-compile",
    help="Visual-token pruning for vision-language models inside the compiled graph (HAWK, arXiv 2604.07812).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Ratio = Annotated[float, typer.Option(help="Fraction of visual tokens removed, in [0, 1).")]
Dtype = Annotated[str, typer.Option(help="Of weights and activations: fp32, fp16 or bf16.")]
Device = Annotated[str | None, typer.Option(help="As torch names it, such as cuda.")]
Backend = Annotated[str, typer.Option(help="What compiles the prefill: inductor, aot_eager or eager.")]
SkipBad = Annotated[bool, typer.Option(help="Go on without samples that cannot be used.")]
Batch = Annotated[int, typer.Option(help="Questions answered together.")]
AnswerTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder.")]


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what this package raises on purpose into one line and exit code 2."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        from hawk_compile.errors import HawkError

        try:
            command(*args, **kwargs)
        except HawkError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None

    return guarded


@app.command()
@clear_errors
def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions to ask, at least 8.")] = 320,
    ratio: Ratio = 0.8,
    seed: Annotated[int, typer.Option(help="Chooses the scene that is shown and the random tokens.")] = 0,
    backend: Backend = "inductor",
    out: Annotated[Path, typer.Option(help="Where to write the picture of the kept tokens.")] = Path("hawk-demo.png"),
) -> None:
    """Ask the shipped model about scenes it has never seen, with and without pruning."""
    from hawk_compile.tools.demo.run import run

    run(console(), questions=questions, ratio=ratio, seed=seed, backend=backend, out=out)


@app.command()
@clear_errors
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder, or a config.json.")],
    ratio: Ratio = 0.8,
    image_tokens: Annotated[int, typer.Option(help="Visual tokens of the prompt that numbers are given for.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Its other tokens.")] = 64,
    layers: Annotated[int, typer.Option(help="Decoder layers to capture; more take longer.")] = 2,
) -> None:
    """Show what the passes find in a model, from its configuration alone: no weights are loaded."""
    from hawk_compile.tools.inspection import inspect_model

    found = inspect_model(path, ratio=ratio, image_tokens=image_tokens, text_tokens=tokens, layers=layers)
    out = console()
    ids = ", ".join(map(str, found.placeholders)) or "none named"
    behind = f"id {' or '.join(map(str, found.vision_end))}" if found.vision_end else "the last visual token"
    until = f", up to the row's last {' or '.join(map(str, found.end_of_turn))}" if found.end_of_turn else ""
    facts = {
        "model": f"{found.model}, {found.layers} decoder layers ({found.captured_layers} captured, on the meta device)",
        "merge": f"{', '.join(found.merges)}: masked_scatter at placeholder ids {ids}",
        "voting text": f"behind {behind}{until}",
        "attention": f"{found.attention}: {found.heads} heads, {found.kv_heads} KV heads of {found.head_dim}",
        "norm": found.norm or "none: the projections read different values",
        "projections": f"{found.query_projection or 'not one linear'}, {found.key_projection or 'not one linear'}",
        "scoring": f"{found.form}: {found.why}",
    }
    out.print(rows(facts))
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


@app.command()
@clear_errors
def calibrate(
    checkpoint: Checkpoint,
    data: Annotated[list[str], typer.Option(help='A JSON Lines file, or "demo:calibration"; may be given repeatedly.')],
    ablation: Annotated[str, typer.Option(help="What leaving a head out means: score, attention or output.")] = "score",
    metric: Annotated[str, typer.Option(help="exact_match, anls, relaxed_accuracy or likelihood.")] = "exact_match",
    ratios: Annotated[str, typer.Option(help="Fractions of visual tokens removed (score).")] = "0.6,0.8,0.9",
    limit: Annotated[int | None, typer.Option(help="No more than the first so many questions of each.")] = None,
    batch: Batch = 8,
    heads_at_once: Annotated[int, typer.Option(help="Heads that one forward leaves out (attention, output).")] = 1,
    tokens: AnswerTokens = 16,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    dtype: Dtype = "fp32",
    device: Annotated[str | None, typer.Option(help="As torch names it; cuda is another GPU in each process.")] = None,
    backend: Backend = "inductor",
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option(help="The file to write, progress beside it.")] = Path("head_weights.json"),
) -> None:
    """Measure how important each query head is; head_weights= takes the file. A run that was cut off goes on.

    Several processes share the work: torchrun --nproc_per_node 2 -m hawk_compile calibrate ...
    """
    from hawk_compile.tools.calibration.commands import calibrate_checkpoint

    calibrate_checkpoint(
        console(), checkpoint, data, out, ratios=ratios, dtype=dtype, device=device, ablation=ablation, metric=metric,
        limit=limit, batch=batch, heads_at_once=heads_at_once, max_new_tokens=tokens, seed=seed, backend=backend,
        skip_bad=skip_bad,
    )  # fmt: skip


@app.command()
@clear_errors
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help='A JSON Lines file of image, question and answer, or "demo".')],
    ratios: Annotated[str, typer.Option(help="Fractions of visual tokens removed.")] = "0.5,0.6,0.8,0.9",
    selectors: Annotated[str, typer.Option(help='Names with commas between, or "all".')] = "all",
    baseline: Annotated[str, typer.Option(help="The selector that others are compared with.")] = "hawk",
    metric: Annotated[str, typer.Option(help="exact_match, anls or relaxed_accuracy.")] = "exact_match",
    limit: Annotated[int | None, typer.Option(help="No more than the first so many questions.")] = None,
    batch: Batch = 8,
    tokens: AnswerTokens = 16,
    dtype: Dtype = "fp32",
    device: Device = None,
    backend: Backend = "inductor",
    skip_bad: SkipBad = False,
    out: Annotated[Path, typer.Option(help="The folder for table, JSON and plot.")] = Path("evaluation"),
) -> None:
    """Compare selectors: how many answers stay right with visual tokens removed."""
    from hawk_compile.tools.evaluation.commands import evaluate_checkpoint

    evaluate_checkpoint(
        console(), checkpoint, data, out, ratios=ratios, selectors=selectors, dtype=dtype, device=device,
        baseline=baseline, metric=metric, limit=limit, batch=batch, max_new_tokens=tokens, backend=backend,
        skip_bad=skip_bad,
    )  # fmt: skip


@app.command()
@clear_errors
def bench(
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint folder; without one, random weights.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="The shapes of: small, tiny, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-4b, internvl3-8b, "
                     "llava-onevision-7b.", show_default="small"),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Fractions of visual tokens removed.")] = "0.5,0.8,0.9",
    tokens: Annotated[str, typer.Option(help="Visual tokens of the image.")] = "576,1024,2048",
    text: Annotated[int, typer.Option(help="Other tokens of the prompt.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows of a prompt.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Dtype = "fp32",
    layers: Annotated[int | None, typer.Option(help="Keep only the first so many decoder layers.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Some of vision,scoring,prefill,first,decode,shapes.", show_default="all"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    backend: Backend = "inductor",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for tables, JSON and plot.")] = None,
) -> None:
    """Time what pruning saves, stage by stage, against the same model eager, compiled, and pruned by hand."""
    from hawk_compile.tools.benchmarking.commands import bench_checkpoint

    bench_checkpoint(
        console(), checkpoint, config, out, ratios=ratios, tokens=tokens, stages=stages, markdown=markdown, text=text,
        batch=batch, device=device, dtype=dtype, layers=layers, rounds=rounds, backend=backend,
    )  # fmt: skip


@app.command()
@clear_errors
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
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("hawk-show.png"),
) -> None:
    """Draw what pruning keeps of a picture for a question, the scores, and each head's own."""
    from hawk_compile.tools.pictures.commands import show_checkpoint

    show_checkpoint(
        console(), checkpoint, image, question, out, ratio=ratio, selector=selector, max_new_tokens=tokens,
        dtype=dtype, device=device, backend=backend,
    )  # fmt: skip


@app.command()
@clear_errors
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="onnx, aoti, openvino, tensorrt or executorch.")] = "onnx",
    ratio: Ratio = 0.8,
    dtype: Dtype = "fp32",
    quantization: Annotated[str | None, typer.Option(help="int8 weights in the decoder (onnx): int8.")] = None,
    size: Annotated[
        list[str], typer.Option(help="A size to build for, as prompt=16:512:2048 (tensorrt, executorch; repeatable).")
    ] = [],  # noqa: B006
    capability: Annotated[
        list[str], typer.Option(help="A GPU's compute capability to build for, as 8.9 (tensorrt; repeatable).")
    ] = [],  # noqa: B006
    check: Annotated[bool, typer.Option(help="Compare the result with PyTorch.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write a checkpoint with pruning inside its prefill, to run without PyTorch."""
    from hawk_compile.exporting.commands import export_checkpoint, sizes_of

    given = {"quantization": quantization, "sizes": sizes_of(size), "compute_capabilities": capability}
    settings = {"format": format, "ratio": ratio, "overwrite": overwrite}
    settings |= {name: value for name, value in given.items() if value}
    export_checkpoint(console(), checkpoint, out, dtype=dtype, check=check, **settings)


@app.command(name="run")
@clear_errors
def run_command(
    folder: Annotated[Path, typer.Argument(help="A folder that export wrote.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")] = [],  # noqa: B006
    ratio: Annotated[float | None, typer.Option(help="Fraction of visual tokens removed; else the export's.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
) -> None:
    """Ask an exported model."""
    from hawk_compile.exporting.commands import run_export

    run_export(console(), folder, image, question, ratio=ratio, tokens=tokens)


@app.command()
@clear_errors
def env() -> None:
    """Print what a bug report needs: versions, machine, backends and switches."""
    from hawk_compile.tools.environment import describe

    console().print(rows(describe()))


@app.command()
@clear_errors
def passes() -> None:
    """List the passes in the order they run, and the environment switches around them."""
    from hawk_compile.compile.pipeline import EXPORT_PASSES, PASSES, PORTABLE_PASSES, disabled_passes
    from hawk_compile.tools.environment import SWITCHES

    left_out = disabled_passes()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "pass", "what it does", ""):
        table.add_column(heading, overflow="fold")
    for number, step in enumerate(PASSES, start=1):
        note = "left out now" if step.name in left_out else "optional" if step.optional else ""
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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
