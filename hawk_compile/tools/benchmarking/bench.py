"""`hawk_compile.bench`: what pruning saves by stages, against the same weights eager, compiled, and pruned by hand."""

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.settings.config import BACKENDS, check_choice, check_ratio
from hawk_compile.tools.benchmarking import memory, prompts, timing
from hawk_compile.tools.benchmarking.floors import Floor, Rates, floors, measure_rates
from hawk_compile.tools.benchmarking.images import Picture, family, picture
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.stages import PRUNED, STAGES
from hawk_compile.tools.benchmarking.subjects import Subjects
from hawk_compile.tools.benchmarking.timing import Call
from hawk_compile.tools.checkpoints import device_named, dtype_named
from hawk_compile.tools.environment import PACKAGES, compiler, machine
from hawk_compile.tools.inspection import Inspection, inspect_model
from hawk_compile.versions import installed

SHAPES = 10
"""Prompt and image sizes that are run, not timed, to count compilations."""
ALL_STAGES = (*STAGES, "shapes")


@dataclass(frozen=True)
class Size:
    """One prompt that was timed.

    Attributes:
        asked: the visual tokens that were asked for; `visual_tokens` is the nearest that an image gives.
        image: its size as the model counts: patches after merging, tiles, or pixels.
        prompt_tokens: S of a row.
    """

    asked: int
    visual_tokens: int
    image: tuple[int, int]
    prompt_tokens: int
    floors: tuple[Floor, ...]


@dataclass(frozen=True)
class Measurement:
    """What one column took in one stage at one size.

    Attributes:
        stage: 'vision', 'scoring', 'prefill', 'first' or 'decode'.
        column: 'eager', 'compiled', 'short' (compiled, of a prompt as short as the pruned one), 'authors' (eager,
            pruned as the authors wrote it) or 'hawk' (`optimize`).
        ratio: fraction of visual tokens removed; None where nothing is.
        seconds: of each round; of a decode step, for 'decode'.
        first_call: seconds of the very first call, compilation included where there is one.
        cache_bytes, peak_bytes: of the prefill; keys and values, and memory above what was in use before.
    """

    visual_tokens: int
    stage: str
    column: str
    ratio: float | None
    seconds: tuple[float, ...]
    first_call: float
    cache_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Shape:
    """A prompt that was run, and how often the pruned prefill had been compiled after it."""

    visual_tokens: int
    prompt_tokens: int
    compilations: int


@dataclass
class Benchmark:
    """Everything that `bench` measured.

    Attributes:
        model, layers, all_layers: the model's class, and its decoder layers, cut and uncut.
        settings: as given, with defaults.
        machine, versions, date, command: where and how.
        rates: what the machine copies and multiplies in a second.
        notes: what is not as asked: sizes that were rounded or skipped.
    """

    model: str
    layers: int
    all_layers: int
    settings: dict[str, Any]
    machine: str
    versions: dict[str, str]
    date: str
    command: str
    rates: Rates
    sizes: list[Size] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, visual: int, stage: str, column: str, ratio: float | None = None) -> Measurement | None:
        """One measurement, or None where it was not made."""
        wanted = (visual, stage, column, ratio)
        found = (each for each in self.measurements
                 if (each.visual_tokens, each.stage, each.column, each.ratio) == wanted)  # fmt: skip
        return next(found, None)

    def markdown(self) -> str:
        """Tables, with what they are tables of above them."""
        from hawk_compile.tools.benchmarking.table import markdown

        return markdown(self)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """bench.md, bench.json and bench.png in a folder.

        Raises:
            InputError: the folder cannot be written to, or matplotlib is missing.
        """
        from hawk_compile.tools.benchmarking.table import write

        return write(self, Path(folder))


@torch.no_grad()
def bench(
    source: str | os.PathLike[str] | PreTrainedConfig = "small",
    *,
    ratios: Sequence[float] = (0.5, 0.8, 0.9),
    tokens: Sequence[int] = (576, 1024, 2048),
    text: int = 64,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "fp32",
    layers: int | None = None,
    stages: Sequence[str] = ALL_STAGES,
    rounds: int = 5,
    backend: str = "inductor",
    command: str | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Time pruning by stages, in one process, all columns in turns, after the pruned logits have been checked.

    Args:
        source: a profile's name (random weights, no download), a checkpoint folder, or a config (random weights).
        ratios: fractions of visual tokens removed, in [0, 1).
        tokens: visual tokens of the image; the nearest number that an image of the model can give is taken and noted.
        text: other tokens of the prompt, half of them before the image.
        batch: rows, all alike.
        device, dtype: 'cpu' or 'cuda'; 'fp32', 'fp16' or 'bf16'.
        layers: keep only the first so many decoder layers.
        stages: of 'vision', 'scoring', 'prefill', 'first', 'decode' and 'shapes' (ten prompt and image sizes, to count
            compilations).
        rounds: timed calls of each column.
        backend: what compiles: 'inductor', 'aot_eager' or 'eager'.
        command: what to write into the result as the command; else this call.
        told: gets a line whenever something begins.

    Raises:
        ConfigError: a ratio, stage or backend that does not exist or is out of range.
        InputError: an unknown profile, device or dtype, numbers out of range, or weights that do not fit into memory.
        UnsupportedModelError: a model that cannot be pruned or whose images are not known here.
        HawkError: the pruned logits are not those of the eager decoder on the kept tokens.
    """
    check_settings(ratios, tokens, text, batch, layers, stages, rounds, backend)
    place, kind = device_named(device), dtype_named(dtype)
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {device!r}")
    settings = {
        "source": name_of(source), "ratios": list(ratios), "tokens": list(tokens), "text": text, "batch": batch,
        "device": device, "dtype": dtype, "layers": layers, "stages": list(stages), "rounds": rounds,
        "backend": backend,
    }  # fmt: skip
    told(f"{settings['source']}: weights")
    model, total = load(source, place, kind, layers, scoring_only=set(stages) == {"scoring"})
    family(model.config)  # refuses a model whose images are not known
    found = Benchmark(
        type(model).__name__, model.config.get_text_config().num_hidden_layers, total, settings, machine(device),
        {name: installed(name) for name in ("hawk-compile", *PACKAGES)} | {"python": platform.python_version()},
        datetime.date.today().isoformat(), command or f"hawk_compile.bench(**{settings})",
        measure_rates(place, kind),
    )  # fmt: skip
    subjects = Subjects(model, backend)
    told("what the passes find")
    site = inspect_model(subjects.plain, layers=1)
    for asked, image in pictures(found, model, tokens):
        run_size(found, subjects, site, asked, image, place, told)
    if "shapes" in stages:
        count_compilations(found, subjects, place, told)
    return found


def check_settings(
    ratios: Sequence[float], tokens: Sequence[int], text: int, batch: int, layers: int | None, stages: Sequence[str],
    rounds: int, backend: str,
) -> None:  # fmt: skip
    for name, given in (("ratios", ratios), ("tokens", tokens), ("stages", stages)):
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"{name} must be one or several different values, got {list(given)}")
    for ratio in ratios:
        check_ratio(ratio)
    for stage in stages:
        check_choice("stages", stage, ALL_STAGES)
    check_choice("backend", backend, BACKENDS)
    if backend == "inductor" and compiler().startswith("none"):
        raise ConfigError("inductor needs a C++ compiler, and there is none: install g++, or give backend aot_eager")
    prompts.check_text(text)
    least = {"tokens": (min(tokens), 2), "batch": (batch, 1), "rounds": (rounds, 1)}
    if layers is not None:
        least["layers"] = (layers, 1)
    for name, (lowest, minimum) in least.items():
        if lowest < minimum:
            raise InputError(f"{name} must be at least {minimum}, got {lowest}")


def name_of(source: Any) -> str:
    return f"{type(source).__name__} (random weights)" if isinstance(source, PreTrainedConfig) else os.fspath(source)


def pictures(found: Benchmark, model: Any, tokens: Sequence[int]) -> list[tuple[int, Picture]]:
    """(tokens asked for, the image), with a note for each that is not exactly what was asked."""
    made: dict[int, tuple[int, Picture]] = {}
    for asked in tokens:
        image = picture(model.config, asked)
        if image.tokens != asked:
            found.notes.append(f"{asked} visual tokens: no image gives so many; the nearest, {image.tokens}, is used")
        made.setdefault(image.tokens, (asked, image))
    return list(made.values())


def run_size(
    found: Benchmark, subjects: Subjects, site: Inspection, asked: int, image: Picture, device: torch.device,
    told: Callable[[str], None],
) -> None:  # fmt: skip
    """All stages of one size. A stage that does not fit into memory is noted, and the next goes on."""
    ratios, text, rows = (found.settings[name] for name in ("ratios", "text", "batch"))
    stages = [name for name in STAGES if name in found.settings["stages"]]
    prompt = prompts.make(subjects.plain, image, text, rows, device)
    least = floors(subjects.plain, site, image.tokens, prompt.length, rows, tuple(ratios))
    found.sizes.append(Size(asked, image.tokens, image.size, prompt.length, tuple(least)))
    given: dict[str, Any] = {}
    checked = False
    for stage in stages:
        told(f"{image.tokens} visual tokens: {stage}")
        try:
            if stage in PRUNED and not given:
                given = prompts.encode(subjects.plain, prompt)
            calls = STAGES[stage](subjects, prompt, given, tuple(ratios))
            first_calls = [timing.seconds(call, device) for call in calls]
            if stage in PRUNED and not checked:
                subjects.check(prompt, given, ratios)
                checked = True
            times = timing.in_turns(calls, found.settings["rounds"], device)
            held = [sizes_of(call, device) if stage == "prefill" else (None, None) for call in calls]
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            found.notes.append(f"{image.tokens} visual tokens, {stage}: skipped, out of memory on {device}")
        else:
            found.measurements += [
                Measurement(image.tokens, stage, call.column, call.ratio, seconds, first_call, *bytes_of)
                for call, seconds, first_call, bytes_of in zip(calls, times, first_calls, held, strict=True)
            ]
        memory.release(device)
    if checked:
        found.shapes.append(Shape(image.tokens, prompt.length, subjects.compilations))


def sizes_of(call: Call, device: torch.device) -> tuple[int, int | None]:
    """(bytes of keys and values, most memory in use) of a prefill."""
    peak, output = memory.peak_bytes(call.prepare(), device)
    return memory.cache_bytes(output.past_key_values), peak


def count_compilations(
    found: Benchmark, subjects: Subjects, device: torch.device, told: Callable[[str], None]
) -> None:
    """Run ten sizes of prompt and image, none larger than the smallest that was timed."""
    told(f"{SHAPES} prompt and image sizes")
    ratio, text, rows = found.settings["ratios"][0], found.settings["text"], found.settings["batch"]
    most = min(size.visual_tokens for size in found.sizes)
    model = subjects.optimized(ratio)
    for number in range(1, SHAPES + 1):
        image = picture(model.config, max(2, most * number // SHAPES))
        prompt = prompts.make(subjects.plain, image, text + number, rows, device)
        model(**prompt.whole)
        found.shapes.append(Shape(image.tokens, prompt.length, subjects.compilations))
