"""What a selector is: a method that scores and ranks the visual tokens of a prompt, with options."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any

from torch import Tensor

from hawk_compile.errors import ConfigError
from hawk_compile.passes.insert_ranking import FORMER_NAMES
from hawk_compile.settings.closest import meant

RankingFunction = Callable[..., Tensor]
BOUNDS = "bounds"


class Selector:
    """How visual tokens are ranked.

    Attributes:
        name: what `selector=` and tables call it.
        options: the ranking's options by name: numbers, text or flags, which JSON can hold.
        ranking: see `rankings.py`; None: by the HAWK score itself.
        query, normalization: of the HAWK score, if the settings do not say.
        head_weights: "uniform" where the method knows no head weights; None: as the settings say.
        portable: whether the ranking can be exported: it consists of operators that other runtimes know.

    Raises:
        ConfigError: an option of another type, or out of its range.
    """

    name: str
    options: Mapping[str, Any]
    ranking: RankingFunction | None = None
    query: str = "mean"
    normalization: str = "l2"
    head_weights: str | None = None
    portable: bool = True

    def __post_init__(self) -> None:
        own = fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        for each in own:
            low, high = each.metadata.get(BOUNDS, (-math.inf, math.inf))
            value = checked_option(self.name, each.name, getattr(self, each.name), type(each.default))
            if not isinstance(value, str) and not low <= value <= high:
                raise ConfigError(
                    f'{each.name} of selector "{self.name}" must be in [{low:g}, {high:g}], got {value!r}'
                )
            object.__setattr__(self, each.name, value)
        object.__setattr__(self, "options", {each.name: getattr(self, each.name) for each in own})

    def reads(self, name: str) -> bool:
        """Whether the ranking reads what has this name."""
        if self.ranking is None:
            return False
        parameters = inspect.signature(self.ranking).parameters
        return name in (FORMER_NAMES.get(parameter, parameter) for parameter in parameters)

    @property
    def defaults(self) -> dict[str, Any]:
        """The options as they are where nothing is said."""
        return {each.name: each.default for each in fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in self.options.items() if value != self.defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def bounded(default: Any, low: float, high: float) -> Any:
    """An option with its least and its largest value."""
    return field(default=default, metadata={BOUNDS: (low, high)})


def checked_option(selector: str, name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(
            f'{name} of selector "{selector}" must be of type {kind.__name__}, got {value!r}: give such a value'
        )
    return value


def check_option_names(argument: str, options: Any, known: Mapping[str, Any], selector: str) -> None:
    if not isinstance(options, Mapping):
        raise ConfigError(f"{argument} must map names to values, got {options!r}: give a dict")
    for name in options:
        if name not in known:
            there_are = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f'{argument} names {name!r} for selector "{selector}"; {there_are}{meant(name, known)}')
