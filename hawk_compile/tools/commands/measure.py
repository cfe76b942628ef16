"""`hawk-compile demo`, `calibrate`, `evaluate` and `bench`: what pruning costs and saves."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hawk_compile.tools.commands.common import (
    AnswerTokens,
    Backend,
    Batch,
    Checkpoint,
    Device,
    Dtype,
    Ratio,
    Settings,
    SkipBad,
    console,
    settings_of,
    values_of,
)

CHECKS = ("nothing removed", "selection", "prefill", "decode", "several turns", "padded batches", "video", "restore")
"""Names of the survey's checks; it is heavy to import."""


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
    settings: Settings = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="The file to write, progress beside it.")] = Path("head_weights.json"),
) -> None:
    """Measure how important each query head is; head_weights= takes the file. A run that was cut off goes on.

    Several processes share the work: torchrun --nproc_per_node 2 -m hawk_compile calibrate ...
    """
    from hawk_compile.tools.calibration.commands import calibrate_checkpoint

    calibrate_checkpoint(
        console(), checkpoint, data, out, ratios=ratios, dtype=dtype, device=device, ablation=ablation, metric=metric,
        limit=limit, batch=batch, heads_at_once=heads_at_once, max_new_tokens=tokens, seed=seed,
        skip_bad=skip_bad, **{"backend": backend, **settings_of(settings)},
    )  # fmt: skip


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
    settings: Settings = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="The folder for table, JSON and plot.")] = Path("evaluation"),
) -> None:
    """Compare selectors: how many answers stay right with visual tokens removed."""
    from hawk_compile.tools.evaluation.commands import evaluate_checkpoint

    evaluate_checkpoint(
        console(), checkpoint, data, out, ratios=ratios, selectors=selectors, dtype=dtype, device=device,
        baseline=baseline, metric=metric, limit=limit, batch=batch, max_new_tokens=tokens,
        skip_bad=skip_bad, **{"backend": backend, **settings_of(settings)},
    )  # fmt: skip


def bench(
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint folder; without one, random weights.")] = None,
    engine: Annotated[str, typer.Option(help="torch (optimize), or vllm (a server).")] = "torch",
    config: Annotated[
        str | None,
        typer.Option(
            help="The shapes of: small, light, tiny, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-4b, internvl3-8b, "
            "llava-onevision-7b.",
            show_default="small",
        ),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Fractions of visual tokens removed.")] = "0.5,0.8,0.9",
    tokens: Annotated[
        str | None, typer.Option(help="Visual tokens of the image.", show_default="576,1024,2048; vllm: 1024")
    ] = None,
    text: Annotated[int, typer.Option(help="Other tokens of the prompt; vllm: words of the question.")] = 64,
    batch: Annotated[int | None, typer.Option(help="Rows of a prompt (torch).", show_default="1")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (torch).", show_default="cpu")] = None,
    dtype: Dtype = "fp32",
    layers: Annotated[int | None, typer.Option(help="Keep only the first so many decoder layers (torch).")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Some of vision,scoring,prefill,first,decode,shapes; vllm: of ratios,prefixes,video.",
            show_default="all",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    requests: Annotated[int | None, typer.Option(help="Requests at once (vllm).", show_default="8")] = None,
    answer: Annotated[int | None, typer.Option(help="Tokens of each one's answer (vllm).", show_default="16")] = None,
    vllm: Annotated[
        list[str],
        typer.Option("--vllm", metavar="NAME=VALUE", help="An argument of vllm.LLM, as block_size=32 (repeatable)."),
    ] = [],  # noqa: B006
    backend: Annotated[
        str | None, typer.Option(help="inductor, aot_eager or eager, for the prefill (torch).", show_default="inductor")
    ] = None,
    settings: Settings = [],  # noqa: B006
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for tables, JSON and plot.")] = None,
) -> None:
    """Time what pruning saves, stage by stage, against the same model eager, compiled, and pruned by hand; or in vLLM
    against unpruned requests to the same engine."""
    only: dict[str, dict[str, Any]] = {
        "torch": {"batch": batch, "device": device, "layers": layers, "backend": backend},
        "vllm": {"requests": requests, "answer": answer, "vllm": vllm},
    }  # fmt: skip
    bench_by(
        engine, only, settings, checkpoint, config, out, ratios=ratios, tokens=tokens, stages=stages, markdown=markdown,
        text=text, dtype=dtype, rounds=rounds,
    )  # fmt: skip


def bench_by(
    engine: str, only: dict[str, dict[str, Any]], settings: list[str], checkpoint: Path | None, config: str | None,
    out: Path | None, **common: Any,
) -> None:  # fmt: skip
    """`bench` with an engine, of whose options `only` holds those that another one does not have."""
    from hawk_compile.tools.served.engines import check_options, told

    check_options(engine, only)
    given = told(**common, **only[engine])
    if engine == "vllm":
        from hawk_compile.tools.served.commands import COMMAND as SERVED

        given |= {"options": values_of(given.pop("vllm"), "vllm"), "hawk": values_of(settings)}
        SERVED.run(console(), checkpoint, config, out, **given)
        return
    from hawk_compile.tools.benchmarking.commands import COMMAND

    COMMAND.run(console(), checkpoint, config, out, **given, **settings_of(settings))


def survey(
    folder: Annotated[Path, typer.Argument(help="Tiny models of architectures, one JSON file each.")],
    types: Annotated[list[str] | None, typer.Argument(help="Names of some of them; all, if left out.")] = None,
    exports: Annotated[str, typer.Option(help="Formats to export to as well, with commas between.")] = "",
    exports_only: Annotated[bool, typer.Option("--exports-only", help="Export, and check nothing else.")] = False,
    checks: Annotated[str, typer.Option(help=f"{', '.join(CHECKS)}: all, or some with commas between.")] = "",
    before: Annotated[Path | None, typer.Option(help="An earlier survey to compare with, or the shipped one.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    table: Annotated[Path | None, typer.Option(help="The page of Markdown to write.")] = None,
) -> None:
    """Hold tiny models of architectures to the plain ones: what is right, new, broken or mended.

    The exit code is 1 if one broke that was right in the earlier survey.
    """
    from hawk_compile.tools.survey.commands import survey_folder

    forms, only = ([each.strip() for each in names.split(",") if each.strip()] for names in (exports, checks))
    if not survey_folder(console(), folder, types or [], out, table, before, forms, exports_only, only):
        raise typer.Exit(1)
