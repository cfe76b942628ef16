"""What is refused of a benchmark before anything is loaded, whichever engine it is of."""

from collections.abc import Sequence
from typing import Any

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.settings.config import check_choice
from hawk_compile.tools.benchmarking.prompts import check_text


def check_sweep(
    ratios: Sequence[float], tokens: Sequence[int], text: int, stages: Sequence[str], known: tuple[str, ...],
    **least: tuple[int | None, int],
) -> None:  # fmt: skip
    """Refuse sizes that cannot be measured.

    Args:
        known: all stages that there are.
        least: by name a number and the least that it may be; None: not given.

    Raises:
        ConfigError: an empty list, one value twice, or an unknown stage.
        InputError: a number that is too small.
    """
    several: dict[str, Sequence[Any]] = {"ratios": ratios, "tokens": tokens, "stages": stages}
    for name, values in several.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} must be one or several different values, got {list(values)}: give each once")
    for stage in stages:
        check_choice("stages", stage, known)
    check_text(text)
    for name, (number, minimum) in {"tokens": (min(tokens), 2), **least}.items():
        if number is not None and number < minimum:
            raise InputError(f"{name} must be at least {minimum}, got {number}")
