"""Many cycles of a model that is optimised, generates, and is restored, and is thrown away: what grows?

    python -m tests.runtime.memory --cycles 1000 [--same] [--backend eager] [--out FIGURES.json] [--plot PLOT.png]
        [--control leak]

Each cycle has a model of its own; with `--same` they share one, at one ratio and another in turn. Prefill and decode
step are compiled anew in each.

The process's own memory (RssAnon: the system may take back pages of files as it likes), and living objects of the
kinds that a compilation leaves: both are measured behind each cycle, once garbage is collected. It exits 1 if a kind
has more objects at the end than in the middle, or if memory has grown by more than `GROWTH` over the last half of
`ENOUGH` cycles or more; before, caches of bounded size fill (SymPy's, torch's). With `--control leak` what was
compiled for each model is held, and it must exit 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hawk_compile
from hawk_compile.compat.dynamo import source_texts
from hawk_compile.tools.benchmarking.memory import release, resident
from hawk_compile.tools.environment import measured_on
from tests import zoo
from tests.runtime.models import generate, picture

TEXTS = "source texts"
KINDS = (
    "GraphModule", "FakeTensor", "FakeTensorMode", "SymNode", "GuardManagerWrapper", "CapturedTraceback",
    "CompiledPrefill", "Runtime", TEXTS,
)  # fmt: skip
"""Names of classes, and the texts of generated code that torch keeps."""
ENOUGH = 400
GROWTH = 8.0
"""MiB."""
PROGRESS = 50
"""Cycles between two lines that say how far it is."""
RATIOS = (0.5, 0.8)

held: list[Any] = []


def cycle(model: PreTrainedModel, name: str, backend: str, ratio: float, leak: bool = False) -> None:
    hawk_compile.optimize(model, ratio=ratio, backend=backend, compile_decode=True)
    generate(model, picture(name), 3)
    if leak:
        held.append(model._hawk_runtime.prefill)
    hawk_compile.restore(model)


def living() -> dict[str, int]:
    """The number of objects of each kind."""
    names = [type(each).__name__ for each in gc.get_objects()]
    return {**{kind: names.count(kind) for kind in KINDS}, TEXTS: len(source_texts)}


def measured(cycles: int, name: str, backend: str, leak: bool, same: bool) -> dict[str, list[float]]:
    """MiB in memory, and objects of each kind, behind each cycle."""
    shared = zoo.build(name, layers=2) if same else None
    figures: dict[str, list[float]] = {"MiB": [], **{kind: [] for kind in KINDS}}
    for number in range(1, cycles + 1):
        cycle(shared or zoo.build(name, layers=2), name, backend, RATIOS[number % 2], leak)
        release(torch.device("cpu"))
        figures["MiB"].append(resident("RssAnon") / 2**20)
        for kind, count in living().items():
            figures[kind].append(count)
        if number % PROGRESS == 0:
            print(number, *(f"{kind} {values[-1]:.0f}" for kind, values in figures.items()), flush=True)
    return figures


def growth(values: list[float]) -> float:
    """By how much the last tenth is above the tenth behind the middle."""
    tenth, half = max(1, len(values) // 10), len(values) // 2
    return statistics.median(values[-tenth:]) - statistics.median(values[half : half + tenth])


def grown(figures: dict[str, list[float]]) -> list[str]:
    """What has grown by more than it may."""
    kinds = [kind for kind in KINDS if growth(figures[kind]) > 0]
    return kinds + (["MiB"] if len(figures["MiB"]) >= ENOUGH and growth(figures["MiB"]) > GROWTH else [])


def draw(figures: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, objects = figure.subplots(2, 1, sharex=True)
    cycles = range(1, len(figures["MiB"]) + 1)
    memory.plot(cycles, figures["MiB"], color="black")
    memory.set_ylabel("own memory (RssAnon), MiB")
    memory.set_ylim(0, 1.2 * max(figures["MiB"]))
    memory.set_title(title, fontsize="medium")
    for kind in KINDS:
        objects.plot(cycles, figures[kind], label=kind)
    objects.set_ylabel("living objects")
    objects.set_ylim(0, max(1.0, *(1.2 * max(figures[kind]) for kind in KINDS)))
    objects.set_xlabel("cycles")
    objects.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--model", choices=zoo.NAMES, default="llava")
    parser.add_argument("--same", action="store_true", help="one model for all cycles")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--control", choices=("leak",), help="what must make it exit 1")
    given = parser.parse_args()
    begun = time.monotonic()
    figures = measured(given.cycles, given.model, given.backend, given.control == "leak", given.same)
    machine = measured_on("cpu")
    whose = "of one model" if given.same else "each with a model of its own"
    title = f"{given.cycles} cycles, {whose} ({given.model}), backend {given.backend}"
    print(f"{title}, {time.monotonic() - begun:.0f} s; {machine}")
    for name, values in figures.items():
        some = values[:: max(1, len(values) // 10)]
        print(name, *(f"{value:.0f}" for value in some), f"{values[-1]:.0f}; {growth(values):+.1f} over the last half")
    if given.out is not None:
        content = {"measured_on": machine, "what": title, **figures}
        given.out.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if given.plot is not None:
        draw(figures, title, given.plot)
    print("grown:", ", ".join(grown(figures)) or "nothing")
    sys.exit(bool(grown(figures)))


if __name__ == "__main__":
    main()
