"""Selectors: how the visual tokens of a prompt are scored and ranked. A class for each method, its options as fields.

    optimize(model, selector=IDPruner(importance=0.3))
    optimize(model, selector="idpruner")                        the same method, its options as they are by default
    optimize(model, selector=my_ranking)                        a function of one's own, see `rankings.py`
    optimize(model, selector=Ranking(my_ranking, {"power": 2.0}, portable=False))
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from hawk_compile.errors import ConfigError
from hawk_compile.passes.insert_ranking import READABLE
from hawk_compile.settings import rankings

RankingFunction = Callable[..., Tensor]
BOUNDS = "bounds"
RESERVED = ("all", "unpruned")
"""What `evaluate` calls all selectors, and none."""


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
        return self.ranking is not None and name in inspect.signature(self.ranking).parameters

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
        raise ConfigError(f'{name} of selector "{selector}" must be of type {kind.__name__}, got {value!r}')
    return value


def check_names(argument: str, options: Any, known: Mapping[str, Any], selector: str) -> None:
    if not isinstance(options, Mapping):
        raise ConfigError(f"{argument} must map names to values, got {options!r}")
    for name in options:
        if name not in known:
            there_are = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f'{argument} names {name!r} for selector "{selector}"; {there_are}')


@dataclass(frozen=True)
class Hawk(Selector):
    """The HAWK score: the mean query of the question."""

    name = "hawk"


@dataclass(frozen=True)
class Uniform(Selector):
    """The HAWK score with all heads alike."""

    name = "uniform"
    head_weights = "uniform"


@dataclass(frozen=True)
class HawkEach(Selector):
    """The attention of each of the question's tokens by itself."""

    name = "hawk_each"
    query, normalization = "each", "softmax"


@dataclass(frozen=True)
class HawkContent(Selector):
    """The same, tokens weighted by how specific their attention is."""

    name = "hawk_content"
    query, normalization = "content", "softmax"


@dataclass(frozen=True)
class FastV(Selector):
    """The attention of the last text token, heads alike (FastV, at layer 0)."""

    name = "fastv"
    query, normalization, head_weights = "last", "softmax", "uniform"


@dataclass(frozen=True)
class DivPrune(Selector):
    """Greedily, the token farthest from all that are kept."""

    name, ranking, portable = "divprune", staticmethod(rankings.divprune), False


@dataclass(frozen=True)
class IDPruner(Selector):
    """Greedily, the HAWK score less the similarity to what is kept.

    Attributes:
        importance: weight of the score, in [0, 1].
    """

    name, ranking, portable = "idpruner", staticmethod(rankings.idpruner), False
    importance: float = bounded(0.5, 0, 1)


@dataclass(frozen=True)
class CDPruner(Selector):
    """Greedily, the largest determinant of similarities weighted by likeness to the question."""

    name, ranking, portable = "cdpruner", staticmethod(rankings.cdpruner), False


@dataclass(frozen=True)
class HawkDiverse(Selector):
    """The same, weighted by the geometric mean of `HawkEach`'s score and that likeness.

    Attributes:
        likeness: share of the likeness, in [0, 1].
    """

    name, ranking, portable = "hawk_diverse", staticmethod(rankings.hawk_diverse), False
    query, normalization = "each", "softmax"
    likeness: float = bounded(0.5, 0, 1)


@dataclass(frozen=True)
class DART(Selector):
    """What resembles a few pivots least.

    Attributes:
        pivots: how many of the visual and of the text tokens, at least 1.
    """

    name, ranking = "dart", staticmethod(rankings.dart)
    pivots: int = bounded(4, 1, math.inf)


@dataclass(frozen=True)
class QAPruner(Selector):
    """The HAWK score and sensitivity to quantisation.

    Attributes:
        bits: of a quantised value, in [2, 16].
        group: channels that share a scale, at least 1.
        error_weight, outlier_weight: of what rounding changes, and of how far a token's values reach.
    """

    name, ranking = "qapruner", staticmethod(rankings.qapruner)
    bits: int = bounded(4, 2, 16)
    group: int = bounded(32, 1, math.inf)
    error_weight: float = 0.25
    outlier_weight: float = 0.25


@dataclass(frozen=True)
class Norm(Selector):
    """The longest embeddings."""

    name, ranking = "norm", staticmethod(rankings.norm)


@dataclass(frozen=True)
class Random(Selector):
    """Noise, the same for the same prompt and seed.

    Attributes:
        seed: in [0, 2**31).
    """

    name, ranking, portable = "random", staticmethod(rankings.random), False
    seed: int = bounded(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class Stride(Selector):
    """Visual tokens at equal distances."""

    name, ranking = "stride", staticmethod(rankings.stride)


@dataclass(frozen=True)
class Ranking(Selector):
    """A ranking function of one's own.

    Attributes:
        function: a function with a name (`def`); see `rankings.py` for what it reads and returns.
        options: values of its options, by name; the others are as it has them.
        portable: whether it consists of operators that other runtimes know, so that `export` may take it.
        name: what tables call it; "": as the function.

    Raises:
        ConfigError: something that is no function with a name, the name of another selector, a parameter that nothing
            can fill, or options of another name or type than the function's.
    """

    function: RankingFunction
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    portable: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        defaults = options_of(self.function)
        name = self.name or self.function.__name__
        check_name(name)
        check_names("options", self.options, defaults, name)
        own = {each: checked_option(name, each, value, type(defaults[each])) for each, value in self.options.items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "ranking", self.function)
        object.__setattr__(self, "options", {**defaults, **own})

    @property
    def defaults(self) -> dict[str, Any]:
        return options_of(self.function)


def options_of(function: RankingFunction) -> dict[str, Any]:
    """The options of a ranking function with their defaults.

    Raises:
        ConfigError: it is none.
    """
    if not inspect.isfunction(function) or not function.__name__.isidentifier():
        raise ConfigError(f"ranking must be a function with a name (def), got {function!r}")
    parameters = inspect.signature(function).parameters.values()
    unknown = [each.name for each in parameters if each.default is each.empty and each.name not in READABLE]
    if unknown:
        raise ConfigError(
            f"ranking {function.__name__} reads {', '.join(unknown)}; there are {', '.join(READABLE)}, and options "
            "need a default"
        )
    options = {each.name: each.default for each in parameters if each.default is not each.empty}
    if wrong := [name for name, default in options.items() if not isinstance(default, (int, float, str))]:
        raise ConfigError(
            f"ranking {function.__name__} has options that are no int, float, str or bool: {', '.join(wrong)}; give "
            "them such a default"
        )
    return options


def check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
        raise ConfigError(f"name must be an identifier other than {' and '.join(RESERVED)}, got {name!r}")
    if name in OF_THIS_PACKAGE:
        raise ConfigError(
            f"name {name!r} is that of another selector: call the function otherwise, or give selectors.Ranking a name"
        )


def selector_of(given: Any) -> Selector:
    """The selector that a setting means: a name, a ranking function, or a selector.

    Raises:
        ConfigError: something else.
    """
    if isinstance(given, Selector):
        return given
    if inspect.isfunction(given):
        return Ranking(given)
    if not isinstance(given, str) or given not in SELECTORS:
        raise ConfigError(
            f"selector must be one of {', '.join(SELECTORS)}, a selector of hawk_compile.selectors, such as "
            f"selectors.DART(pivots=8), or a ranking function, got {given!r}"
        )
    return SELECTORS[given]


def selector_named(name: str, options: Mapping[str, Any]) -> Selector:
    """The selector of a name with options from JSON, as manifests and command lines have them.

    Raises:
        ConfigError: an unknown name, or options that it does not have.
    """
    return with_options(selector_of(name), options)


def with_options(selector: Selector, options: Any) -> Selector:
    check_names("selector_options", options, selector.options, selector.name)
    if isinstance(selector, Ranking):
        return replace(selector, options={**selector.options, **options})
    return replace(selector, **options)  # type: ignore[type-var]


def register_selector(name: str, ranking: RankingFunction, *, portable: bool = True) -> None:
    """Deprecated: give the function itself, `selector=ranking`, or `selectors.Ranking(ranking, options, ...)`.

    Raises:
        ConfigError: a name that is taken, something that is no function, or a parameter that nothing can fill.
    """
    check_name(name)
    if name in SELECTORS and not same_function(SELECTORS[name].ranking, ranking):
        raise ConfigError(f"name {name!r} is that of another selector: choose another one")
    SELECTORS[name] = made = Ranking(ranking, portable=portable, name=name)
    instead = made.function.__name__ if portable else f"selectors.Ranking({made.function.__name__}, portable=False)"
    warn_of_old_spelling(f'register_selector("{name}", ...) is deprecated: give selector={instead}')


def same_function(one: RankingFunction | None, other: Any) -> bool:
    """Whether one is the other, or a function defined again in its place, as in a notebook."""
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (one, other)]
    return one is other or (one is not None and names[0] == names[1])


def warn_of_old_spelling(text: str) -> None:
    """A DeprecationWarning at the line outside this package that it is about."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("hawk_compile."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, DeprecationWarning, stacklevel=depth)


METHODS = (
    Hawk, Uniform, HawkEach, HawkContent, FastV, DivPrune, IDPruner, CDPruner, HawkDiverse, DART, QAPruner, Norm,
    Random, Stride,
)  # fmt: skip
OF_THIS_PACKAGE = tuple(method.name for method in METHODS)
SELECTORS: dict[str, Selector] = {}
"""Selectors by name: those of this package with their options as they are by default, and what was registered."""
SELECTORS.update((method.name, method()) for method in METHODS)
