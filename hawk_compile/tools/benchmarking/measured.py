"""What a benchmark measured: every size, every measurement, and where it was made."""

from dataclasses import dataclass, field
from typing import Any

from hawk_compile.tools.benchmarking.floors import Floor, Rates


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
class Measured:
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
        for made in self.measurements:
            if (made.visual_tokens, made.stage, made.column, made.ratio) == wanted:
                return made
        return None
