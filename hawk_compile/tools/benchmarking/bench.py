"""`hawk_compile.bench`: what pruning saves by stages, against the same weights eager, compiled, and pruned by hand."""

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.files import path_of
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.settings.config import HawkConfig, make_config_of_ratios
from hawk_compile.tools.benchmarking import memory, prompts, timing
from hawk_compile.tools.benchmarking.checked import check_sweep
from hawk_compile.tools.benchmarking.floors import floors, measure_rates
from hawk_compile.tools.benchmarking.images import Picture, family, picture
from hawk_compile.tools.benchmarking.measured import Measurement, Shape, Size
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.result import Benchmark
from hawk_compile.tools.benchmarking.stages import PRUNED, STAGES
from hawk_compile.tools.benchmarking.subjects import Subjects
from hawk_compile.tools.benchmarking.timing import Call
from hawk_compile.tools.checkpoints import device_named, dtype_named
from hawk_compile.tools.environment import PACKAGES, compiler, machine
from hawk_compile.tools.inspection.inspect import Inspection, inspect_model
from hawk_compile.versions import installed

SHAPES = 10
"""Prompt and image sizes that are run, not timed, to count compilations."""
ALL_STAGES = (*STAGES, "shapes")


@torch.no_grad()
def bench(
    source: str | os.PathLike[str] | PreTrainedConfig = "small",
    config: HawkConfig | None = None,
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
    command: str | None = None,
    progress: Listener = nobody,
    **settings: Any,
) -> Benchmark:
    """Time pruning by stages, in one process, all columns in turns, after the pruned logits have been checked.

    Args:
        source: a profile's name (random weights, no download), a checkpoint folder, or a config (random weights).
        config: how the pruned columns prune, of which `ratios` take the place of one, or
        **settings: this by name, as for `optimize`: backend, selector, ... Without a config, all that can be compiled
            is, and heads weigh alike. Columns that are not pruned are compiled by the same backend.
        ratios: fractions of visual tokens removed, in [0, 1).
        tokens: visual tokens of the image; the nearest number that an image of the model can give is taken and noted.
        text: other tokens of the prompt, half of them before the image.
        batch: rows, all alike.
        device, dtype: 'cpu' or 'cuda'; 'fp32', 'fp16' or 'bf16'.
        layers: keep only the first so many decoder layers.
        stages: of 'vision', 'scoring', 'prefill', 'first', 'decode' and 'shapes' (ten prompt and image sizes, to count
            compilations).
        rounds: timed calls of each column.
        command: what to write into the result as the command; else this call.
        progress: told what begins, and how many stages of how many are done.

    Raises:
        ConfigError: a ratio, stage or setting that does not exist, is out of range, or of which the other columns have
            no like.
        InputError: an unknown profile, device or dtype, numbers out of range, or weights that do not fit into memory.
        UnsupportedModelError: a model that cannot be pruned or whose images are not known here.
        HawkError: the pruned logits are not those of the eager decoder on the kept tokens.
    """
    made = config_of(config, settings, ratios)
    check_sweep(ratios, tokens, text, stages, ALL_STAGES, batch=(batch, 1), rounds=(rounds, 1), layers=(layers, 1))
    place, kind = device_named(device), dtype_named(dtype)
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {device!r}")
    asked = {
        "source": name_of(source), "ratios": list(ratios), "tokens": list(tokens), "text": text, "batch": batch,
        "device": device, "dtype": dtype, "layers": layers, "stages": list(stages), "rounds": rounds,
        "backend": made.backend, **{name: str(value) for name, value in settings.items() if name != "backend"},
    }  # fmt: skip
    progress(Progress(0, 0, f"{asked['source']}: weights"))
    model, total = load(source, place, kind, layers, scoring_only=set(stages) == {"scoring"})
    family(model.config)  # refuses a model whose images are not known
    result = Benchmark(
        type(model).__name__, model.config.get_text_config().num_hidden_layers, total, asked, machine(device),
        {name: installed(name) for name in ("hawk-compile", *PACKAGES)} | {"python": platform.python_version()},
        datetime.date.today().isoformat(), command or f"hawk_compile.bench(**{asked})", measure_rates(place, kind),
    )  # fmt: skip
    progress(Progress(0, 0, "what the passes find"))
    subjects = Subjects(model, made)
    site = inspect_model(subjects.plain, layers=1)
    run = Run(result, subjects, site, place, progress)
    run.measure(pictures(result, model, tokens))
    return result


def config_of(config: HawkConfig | None, settings: dict[str, Any], ratios: Sequence[float]) -> HawkConfig:
    """How the pruned columns prune.

    Raises:
        ConfigError: settings out of range, or numbers of kept tokens that the other columns cannot have.
    """
    defaults = {} if config is not None else {"head_weights": "uniform", "compile_decode": True, "compile_vision": True}
    made = make_config_of_ratios(config, {**defaults, **settings}, ratios)
    if made.budget is not None or made.per_image or made.bucket > 1:
        raise ConfigError(
            "budget, min_per_image, quota, bucket and normalize_per must be left out of a benchmark, whose other "
            "columns keep what a ratio leaves: give ratios alone"
        )
    if made.image_cache is not None:
        raise ConfigError("image_cache would have a benchmark time images that are encoded already: leave it out")
    if made.backend == "inductor" and compiler().startswith("none"):
        raise ConfigError("inductor needs a C++ compiler, and there is none: install g++, or give backend aot_eager")
    return made


def name_of(source: Any) -> str:
    if isinstance(source, PreTrainedConfig):
        return f"{type(source).__name__} (random weights)"
    return str(path_of(source, "source"))


def pictures(result: Benchmark, model: Any, tokens: Sequence[int]) -> list[tuple[int, Picture]]:
    """(tokens asked for, the image), with a note for each that is not exactly what was asked."""
    made: dict[int, tuple[int, Picture]] = {}
    for asked in tokens:
        image = picture(model.config, asked)
        if image.tokens != asked:
            result.notes.append(f"{asked} visual tokens: no image gives so many; the nearest, {image.tokens}, is used")
        made.setdefault(image.tokens, (asked, image))
    return list(made.values())


@dataclass
class Run:
    """The stages of a benchmark, whose measurements go into its result."""

    result: Benchmark
    subjects: Subjects
    site: Inspection
    device: torch.device
    progress: Listener

    def __post_init__(self) -> None:
        self.ratios, self.text, self.rows = (self.result.settings[name] for name in ("ratios", "text", "batch"))
        self.stages = [name for name in STAGES if name in self.result.settings["stages"]]
        self.done = self.total = 0

    def begin(self, what: str) -> None:
        self.progress(Progress(self.done, self.total, what))
        self.done += 1

    def measure(self, images: list[tuple[int, Picture]]) -> None:
        count_shapes = "shapes" in self.result.settings["stages"]
        self.total = len(images) * len(self.stages) + count_shapes
        for asked, image in images:
            self.run_size(asked, image)
        if count_shapes:
            self.count_compilations()
        self.progress(Progress(self.total, self.total))

    def run_size(self, asked: int, image: Picture) -> None:
        """All stages of one size. A stage that does not fit into memory is noted, and the next goes on."""
        prompt = prompts.make(self.subjects.plain, image, self.text, self.rows, self.device)
        least = floors(self.subjects.plain, self.site, image.tokens, prompt.length, self.rows, tuple(self.ratios))
        self.result.sizes.append(Size(asked, image.tokens, image.size, prompt.length, tuple(least)))
        encoded: dict[str, Any] = {}
        checked = False
        for stage in self.stages:
            self.begin(f"{image.tokens} visual tokens: {stage}")
            try:
                if stage in PRUNED and not encoded:
                    encoded = prompts.encode(self.subjects.plain, prompt)
                self.run_stage(stage, prompt, encoded, check=stage in PRUNED and not checked)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error):
                    raise
                self.result.notes.append(
                    f"{image.tokens} visual tokens, {stage}: skipped, out of memory on {self.device}"
                )
            else:
                checked = checked or stage in PRUNED
            memory.release(self.device)
        if checked:
            self.result.shapes.append(Shape(image.tokens, prompt.length, self.subjects.compilations))

    def run_stage(self, stage: str, prompt: prompts.Prompt, encoded: dict[str, Any], check: bool) -> None:
        """Time all calls of a stage in turns, after the pruned logits have been checked."""
        calls = STAGES[stage](self.subjects, prompt, encoded, tuple(self.ratios))
        first_calls = [timing.seconds(call, self.device) for call in calls]
        if check:
            self.subjects.check(prompt, encoded, self.ratios)
        times = timing.in_turns(calls, self.result.settings["rounds"], self.device)
        held = [sizes_of(call, self.device) if stage == "prefill" else (None, None) for call in calls]
        self.result.measurements += [
            Measurement(prompt.image.tokens, stage, call.column, call.ratio, seconds, first_call, *bytes_of)
            for call, seconds, first_call, bytes_of in zip(calls, times, first_calls, held, strict=True)
        ]

    def count_compilations(self) -> None:
        """Run ten sizes of prompt and image, none larger than the smallest that was timed."""
        self.begin(f"{SHAPES} prompt and image sizes")
        most = min(size.visual_tokens for size in self.result.sizes)
        model = self.subjects.optimized(self.ratios[0])
        for number in range(1, SHAPES + 1):
            image = picture(model.config, max(2, most * number // SHAPES))
            prompt = prompts.make(self.subjects.plain, image, self.text + number, self.rows, self.device)
            model(**prompt.whole)
            self.result.shapes.append(Shape(image.tokens, prompt.length, self.subjects.compilations))


def sizes_of(call: Call, device: torch.device) -> tuple[int, int | None]:
    """(bytes of keys and values, most memory in use) of a prefill."""
    peak, output = memory.peak_bytes(call.prepare(), device)
    return memory.cache_bytes(output.past_key_values), peak
