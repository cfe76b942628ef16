"""An evaluation as a table in Markdown, as JSON and as a plot."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawk_compile.errors import InputError
from hawk_compile.files import write_whole
from hawk_compile.tools.evaluation.scored import Row, Scored
from hawk_compile.tools.evaluation.statistics import Interval, difference, holm, interval
from hawk_compile.tools.writing import check_writable

SIGNIFICANT = 0.05
HEADINGS = (
    "removed", "method", "accuracy", "95 % interval", "of unpruned", "against {baseline}", "95 % interval", "p",
    "visual tokens", "prefill ms",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One row with its statistics.

    Attributes:
        relative: its mean score over that of the unpruned model; None where that is 0.
        gap: its score minus the baseline's at the same ratio; None for the baseline and the unpruned model.
        p: of that gap, corrected by Holm's method for the comparisons made at this ratio.
    """

    row: Row
    score: Interval
    relative: float | None
    gap: Interval | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """'better' or 'worse' than the baseline if the gap is significant, else nothing."""
        if self.gap is None or self.p is None or self.p >= SIGNIFICANT:
            return ""
        return "better" if self.gap.mean > 0 else "worse"


def lines(found: Scored) -> list[Line]:
    """The unpruned model, then every ratio with its methods, the best first."""
    whole = found.unpruned.scores.mean()

    def relative(row: Row) -> float | None:
        return float(row.scores.mean() / whole) if whole else None

    result = [Line(found.unpruned, interval(found.unpruned.scores), 1.0)]
    for ratio in dict.fromkeys(row.ratio for row in found.rows):
        rows = sorted((row for row in found.rows if row.ratio == ratio), key=lambda row: -row.scores.mean())
        base = found.row(found.baseline, ratio)
        gaps = {row.method: difference(row.scores, base.scores) for row in rows if row is not base}
        corrected = dict(zip(gaps, holm([p for _, p in gaps.values()]), strict=True))
        for row in rows:
            gap = gaps[row.method][0] if row.method in gaps else None
            result.append(Line(row, interval(row.scores), relative(row), gap, corrected.get(row.method)))
    return result


def markdown(found: Scored, made: list[Line] | None = None) -> str:
    """A table, with what it is a table of above it. `made` are its lines, where they are known: they take time."""
    head = [heading.format(baseline=found.baseline) for heading in HEADINGS]
    cells = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    cells += [cells_of(line, found.visual) for line in made or lines(found)]
    about = (
        f"{len(found.samples)} questions of {found.data}, {found.metric}, {found.model}; {found.visual:.1f} visual "
        "tokens a prompt. Intervals: bootstrap over questions; against "
        f"{found.baseline}: paired, p by random signs, corrected for the methods of a ratio (Holm)."
    )
    return about + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def cells_of(line: Line, visual: float) -> list[str]:
    row = line.row
    gap = f"{line.gap.mean:+.3f} {line.verdict}".strip() if line.gap else ""
    return [
        f"{row.ratio:g}", row.method, f"{line.score.mean:.3f}", f"{line.score.low:.3f} to {line.score.high:.3f}",
        "" if line.relative is None else f"{line.relative:.3f}", gap,
        "" if line.gap is None else f"{line.gap.low:+.3f} to {line.gap.high:+.3f}",
        "" if line.p is None else f"{line.p:.4f}",
        "" if row.kept is None else f"{row.kept:.1f}",
        "" if row.seconds is None else f"{1e3 * row.seconds:.1f}",
    ]  # fmt: skip


def as_json(found: Scored, made: list[Line] | None = None) -> dict[str, Any]:
    """Everything that was measured, the score of every sample with it."""
    return {
        "model": found.model, "data": found.data, "metric": found.metric, "baseline": found.baseline,
        "samples": [{"origin": each.origin, "question": each.question, "kind": each.kind} for each in found.samples],
        "visual_tokens": found.visual,
        "rows": [{
            "method": line.row.method, "ratio": line.row.ratio, "score": vars(line.score), "relative": line.relative,
            "gap": vars(line.gap) if line.gap else None, "p": line.p, "kept_visual_tokens": line.row.kept,
            "prefill_seconds": line.row.seconds, "scores": [round(float(each), 6) for each in line.row.scores],
        } for line in made or lines(found)],
    }  # fmt: skip


def write(found: Scored, folder: Path) -> list[Path]:
    """evaluation.md, evaluation.json and evaluation.png in a folder.

    Raises:
        InputError: as `check_writable`.
    """
    check_writable(folder)
    made = lines(found)
    written = [folder / f"evaluation.{suffix}" for suffix in ("md", "json", "png")]
    try:
        write_whole(written[0], markdown(found, made))
        write_whole(written[1], json.dumps(as_json(found, made), allow_nan=False) + "\n")
        plot(found, made, written[2])
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}): give another folder") from None
    return written


def plot(found: Scored, made: list[Line], path: Path) -> None:
    """Score over the fraction removed, a line for each method, with intervals."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=colors, marker=[*"osv^D"] * (len(colors) // 5))
    unpruned, *others = made
    axes.axhline(unpruned.score.mean, color="black", linestyle=":", label="unpruned")
    for method in dict.fromkeys(row.method for row in found.rows):
        own = sorted((line for line in others if line.row.method == method), key=lambda line: line.row.ratio)
        means = [line.score.mean for line in own]
        bars = [[line.score.mean - line.score.low for line in own], [line.score.high - line.score.mean for line in own]]
        axes.errorbar([line.row.ratio for line in own], means, yerr=bars, capsize=2, label=method)
    axes.set_xlabel("fraction of visual tokens removed")
    axes.set_ylabel(found.metric)
    axes.set_title(f"{len(found.samples)} questions, {found.visual:.0f} visual tokens a prompt")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
