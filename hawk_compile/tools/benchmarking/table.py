"""A benchmark as tables in Markdown, as JSON and as a plot. Ratios stand first: they carry over between machines."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hawk_compile.errors import InputError
from hawk_compile.files import write_whole
from hawk_compile.tools.benchmarking import savings
from hawk_compile.tools.benchmarking.floors import Floor
from hawk_compile.tools.benchmarking.measured import Measured, Measurement, Size
from hawk_compile.tools.benchmarking.timing import Spread, spread
from hawk_compile.tools.writing import check_writable

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""(what it shows, headings, lines)."""

STAGE_NAMES = {"prefill": "prefill", "first": "first token", "decode": "decode step"}
HEADINGS = (
    "V", "stage", "removed", "S -> S'", "pruned / compiled", "short / compiled", "pruned / short", "FLOP ratio",
    "causal", "pruned / eager", "pruned / by hand", "eager ms", "compiled ms", "by hand ms", "pruned ms", "floor ms",
)  # fmt: skip
SCORING_HEADINGS = (
    "V", "removed", "by hand / pruned", "of the unpruned prefill", "of the pruned prefill", "by hand ms", "pruned ms",
    "floor ms",
)  # fmt: skip
MEMORY_HEADINGS = (
    "V", "removed", "KV cache, pruned / unpruned", "KV cache MB", "pruned MB", "peak MB: eager", "compiled", "by hand",
    "pruned",
)  # fmt: skip


def over(above: Measurement | None, below: Measurement | None) -> Spread | None:
    """One time over another, round by round."""
    if above is None or below is None:
        return None
    return spread([a / b for a, b in zip(above.seconds, below.seconds, strict=True)])


def rows(found: Measured) -> list[tuple[str, ...]]:
    """Each size, stage and ratio that was measured."""
    lines = []
    for size in found.sizes:
        for stage, name in STAGE_NAMES.items():
            for floor in size.floors:
                pruned = found.of(size.visual_tokens, stage, "hawk", floor.ratio)
                if pruned is not None:
                    lines.append((f"{size.visual_tokens}", name, *row(found, size, stage, floor, pruned)))
    return lines


def row(found: Measured, size: Size, stage: str, floor: Floor, pruned: Measurement) -> tuple[str, ...]:
    eager, compiled = (found.of(size.visual_tokens, stage, column) for column in ("eager", "compiled"))
    short, authors = (found.of(size.visual_tokens, stage, column, floor.ratio) for column in ("short", "authors"))
    work = (floor.flop_ratio, floor.causal_flop_ratio) if stage == "prefill" else (None, None)
    least = floor.seconds(stage, found.rates)
    return (
        f"{floor.ratio:g}", f"{floor.prompt_tokens} -> {floor.kept_tokens}",
        *(share(over(*each)) for each in ((pruned, compiled), (short, compiled), (pruned, short))),
        *("" if each is None else f"{each:.3f}" for each in work),
        share(over(pruned, eager)), share(over(pruned, authors)),
        *(milliseconds(each) for each in (eager, compiled, authors, pruned)),
        "" if least is None else f"{1e3 * least:.2f}",
    )  # fmt: skip


def scoring_rows(found: Measured) -> list[tuple[str, ...]]:
    lines = []
    for size in found.sizes:
        for floor in size.floors:
            own, authors = (found.of(size.visual_tokens, "scoring", name, floor.ratio) for name in ("hawk", "authors"))
            if own is None:
                continue
            wholes = (("compiled", None), ("hawk", floor.ratio))
            parts = [part_of(own, found.of(size.visual_tokens, "prefill", *whole)) for whole in wholes]
            least = floor.seconds("scoring", found.rates)
            times = over(authors, own)
            lines.append((
                f"{size.visual_tokens}", f"{floor.ratio:g}",
                "" if times is None else f"{times.median:.1f} ({times.iqr:.1f})", *parts,
                milliseconds(authors), milliseconds(own), "" if least is None else f"{1e3 * least:.3f}",
            ))  # fmt: skip
    return lines


def part_of(part: Measurement, whole: Measurement | None) -> str:
    return "" if whole is None else f"{spread(part.seconds).median / spread(whole.seconds).median:.2%}"


def memory_rows(found: Measured) -> list[tuple[str, ...]]:
    lines = []
    for size in found.sizes:
        for floor in size.floors:
            columns = (("eager", None), ("compiled", None), ("authors", floor.ratio), ("hawk", floor.ratio))
            held = [found.of(size.visual_tokens, "prefill", *each) for each in columns]
            whole, pruned = held[0], held[-1]
            if whole is None or pruned is None or not whole.cache_bytes or not pruned.cache_bytes:
                continue
            lines.append((
                f"{size.visual_tokens}", f"{floor.ratio:g}", f"{pruned.cache_bytes / whole.cache_bytes:.3f}",
                f"{whole.cache_bytes / 1e6:.2f}", f"{pruned.cache_bytes / 1e6:.2f}",
                *("" if each is None or each.peak_bytes is None else f"{each.peak_bytes / 1e6:.1f}" for each in held),
            ))  # fmt: skip
    return lines


def share(given: Spread | None) -> str:
    return "" if given is None else f"{given.median:.3f} ({given.iqr:.3f})"


def milliseconds(given: Measurement | None) -> str:
    if given is None:
        return ""
    found = spread(given.seconds)
    return f"{1e3 * found.median:.2f} ({1e3 * found.iqr:.2f})"


def tables(found: Measured) -> list[Table]:
    """Those that have lines."""
    made = [
        (savings.ABOUT, savings.HEADINGS, savings.rows(found)),
        (
            'Times; ratios round by round. Median (interquartile range). "pruned" is `optimize`; "compiled" the same '
            'capture and compiler without pruning; "short" that for a prompt that never held more than the kept '
            'tokens; "by hand" the method as its authors wrote it, around the eager model. The first token\'s vision '
            'encoder is compiled in "compiled" and "pruned". FLOP ratio: attention counts S x S; causal: half of that, '
            "as its kernels skip the rest. Floor: causal FLOPs over the rate of a matrix product (prefill), or bytes "
            "over the bandwidth (decode).",
            HEADINGS, rows(found),
        ),
        (
            "HAWK's own share: norm, score, selection and gather of the embeddings, compiled by themselves, so with "
            'the cost of a call of their own; "by hand" eager. Floor: what must be read and written, once, over the '
            "bandwidth, or FLOPs over their rate.",
            SCORING_HEADINGS, scoring_rows(found),
        ),
        (
            "Memory of a prefill: keys and values it leaves behind, and the most in use above what was before.",
            MEMORY_HEADINGS, memory_rows(found),
        ),
    ]  # fmt: skip
    return [each for each in made if each[2]]


def head(found: Measured) -> list[str]:
    """What was measured, where and how, and what is not as asked."""
    given = found.settings
    whole = found.layers == found.all_layers
    cut = f"{found.layers} decoder layers" if whole else f"CUT to the first {found.layers} of {found.all_layers} layers"
    seen = ", ".join(f"{each} {found.versions[each]}" for each in ("torch", "transformers", "triton"))
    lines = [
        f"{found.machine}; {seen}; {found.date}",
        f"`{found.command}`",
        f"{given['source']}: {found.model}, {cut}; batch {given['batch']}, "
        f"{given['dtype']}, backend {given['backend']}, {given['rounds']} rounds. The machine copies "
        f"{found.rates.bandwidth / 1e9:,.0f} GB/s and multiplies {found.rates.matmul / 1e12:,.2f} TFLOP/s.",
    ]
    return [*lines, *compiled_lines(found), *vision_lines(found), *(f"Note: {note}." for note in found.notes)]


def compiled_lines(found: Measured) -> list[str]:
    if not found.shapes:
        return []
    total = found.shapes[-1].compilations
    last = next(number for number, shape in enumerate(found.shapes, 1) if shape.compilations == total)
    sizes = len({(shape.visual_tokens, shape.prompt_tokens) for shape in found.shapes})
    lines = [f"Compilations of the pruned prefill: {total} for {sizes} prompt and image sizes, last at number {last}."]
    visual = found.sizes[0].visual_tokens
    ratio = found.sizes[0].floors[0].ratio
    firsts = [(name, found.of(visual, "prefill", *which)) for name, which in
              (("compiled", ("compiled", None)), ("pruned", ("hawk", ratio)))]  # fmt: skip
    spent = [f"{name} {each.first_call:.1f} s" for name, each in firsts if each is not None]
    if spent:
        lines.append(f"First call of the prefill, with compilation or its cache on disk: {', '.join(spent)}.")
    return lines


def vision_lines(found: Measured) -> list[str]:
    spent = []
    for visual in (size.visual_tokens for size in found.sizes):
        eager, compiled = (found.of(visual, "vision", column) for column in ("eager", "compiled"))
        if eager is not None and compiled is not None:
            times = f"{milliseconds(compiled)} over {milliseconds(eager)} ms"
            spent.append(f"{share(over(compiled, eager))} at V = {visual} ({times})")
    return [f"Vision encoder, compiled over eager: {', '.join(spent)}."] if spent else []


def markdown(found: Measured) -> str:
    """Head and tables."""
    return as_markdown(head(found), tables(found))


def as_markdown(above: Sequence[str], shown: Sequence[Table]) -> str:
    """Lines, and tables under them."""
    parts = ["\n\n".join(above)]
    for about, headings, lines in shown:
        cells = [headings, ("---:",) * len(headings), *lines]
        parts.append(about + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join(parts) + "\n"


def as_json(found: Measured) -> dict[str, Any]:
    """Every number: all rounds of all measurements, floors, rates, shapes, and where it was."""
    made = dataclasses.asdict(found)
    for size, own in zip(made["sizes"], found.sizes, strict=True):
        for line, floor in zip(size["floors"], own.floors, strict=True):
            line |= {"flop_ratio": floor.flop_ratio, "causal_flop_ratio": floor.causal_flop_ratio}
            line["seconds"] = {stage: floor.seconds(stage, found.rates) for stage in ("prefill", "scoring", "decode")}
    for line, each in zip(made["measurements"], found.measurements, strict=True):
        line |= {f"{name}_seconds": value for name, value in vars(spread(each.seconds)).items()}
    return made


def write(found: Measured, folder: Path) -> list[Path]:
    """bench.md, bench.json, and bench.png where the prefill was timed.

    Raises:
        InputError: the folder cannot be written to, or matplotlib is missing.
    """
    check_writable(folder)
    written = [folder / "bench.md", folder / "bench.json"]
    try:
        write_whole(written[0], markdown(found))
        write_whole(written[1], json.dumps(as_json(found), allow_nan=False) + "\n")
        if found.of(found.sizes[0].visual_tokens, "prefill", "compiled") is not None:
            written.append(folder / "bench.png")
            plot(found, written[2])
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}): give another folder") from None
    return written


def plot(found: Measured, path: Path) -> None:
    """The prefill's time over the compiled unpruned one's, by the fraction removed; dashed: the FLOP ratio, causal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for size in found.sizes:
        least = sorted(size.floors, key=lambda floor: floor.ratio)
        compiled = found.of(size.visual_tokens, "prefill", "compiled")
        pruned = [over(found.of(size.visual_tokens, "prefill", "hawk", floor.ratio), compiled) for floor in least]
        points = [(floor.ratio, each) for floor, each in zip(least, pruned, strict=True) if each is not None]
        if not points:
            continue
        ratios = [ratio for ratio, _ in points]
        drawn = axes.errorbar(
            ratios, [each.median for _, each in points], yerr=[each.iqr / 2 for _, each in points], marker="o",
            capsize=2, label=f"{size.visual_tokens} visual tokens",
        )  # fmt: skip
        work = [(floor.ratio, floor.causal_flop_ratio) for floor in least if floor.causal_flop_ratio is not None]
        axes.plot(*zip(*work, strict=True), linestyle="--", color=drawn.lines[0].get_color())  # type: ignore[misc]
    axes.set_xlabel("fraction of visual tokens removed")
    axes.set_ylabel("prefill: pruned / compiled unpruned")
    axes.set_title(f"{found.model}, {found.layers} layers (dashed: FLOP ratio with causal attention)")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)
