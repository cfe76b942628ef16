"""What pruning saves of a prompt, and what the rest of the time to its first token goes to."""

from hawk_compile.tools.benchmarking.measured import Measured, Measurement
from hawk_compile.tools.benchmarking.timing import spread

HEADINGS = (
    "V", "removed", "first token saved", "decode step saved", "KV cache saved", "unpruned ms", "pruned ms",
    "left: vision encoder", "left: prefill", "of it scoring", "left: the rest",
)  # fmt: skip
ABOUT = (
    "What pruning saves over the same model compiled and unpruned, and what the pruned first token's time goes to. The "
    "rest is neither encoder nor prefill: positions, the token's choice, generate itself. Medians of stages that were "
    "timed by themselves, so shares add up roughly."
)


def rows(found: Measured) -> list[tuple[str, ...]]:
    """A line for each size and ratio whose first token was timed; what was not measured is left empty."""
    lines = []
    for size in found.sizes:
        for ratio in (floor.ratio for floor in size.floors):
            pair = [found.of(size.visual_tokens, "first", *which) for which in (("compiled", None), ("hawk", ratio))]
            whole, first = map(median, pair)
            if whole is None or first is None:
                continue
            visual = size.visual_tokens
            lines.append((
                f"{visual}", f"{ratio:g}", saved(whole, first), *others(found, visual, ratio), f"{1e3 * whole:.1f}",
                f"{1e3 * first:.1f}", *left(found, visual, ratio, first),
            ))  # fmt: skip
    return lines


def others(found: Measured, visual: int, ratio: float) -> tuple[str, str]:
    """What is saved of a decode step and of the cache."""
    steps = [median(found.of(visual, "decode", *which)) for which in (("compiled", None), ("hawk", ratio))]
    prefills = [found.of(visual, "prefill", *which) for which in (("compiled", None), ("hawk", ratio))]
    held = [None if each is None else each.cache_bytes for each in prefills]
    return saved(*steps), saved(*held)


def left(found: Measured, visual: int, ratio: float, first: float) -> tuple[str, ...]:
    """Shares of a pruned first token that takes `first` seconds."""
    encoder = median(found.of(visual, "vision", "compiled") or found.of(visual, "vision", "eager"))
    prefill, scoring = (median(found.of(visual, stage, "hawk", ratio)) for stage in ("prefill", "scoring"))
    rest = None if encoder is None or prefill is None else first - encoder - prefill
    return tuple("" if each is None else percent(each / first) for each in (encoder, prefill, scoring, rest))


def saved(whole: float | None, pruned: float | None) -> str:
    return "" if not whole or pruned is None else percent(1 - pruned / whole)


def median(given: Measurement | None) -> float | None:
    return None if given is None else spread(given.seconds).median


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
