"""Selectors by what a setting gives: a name, a selector, or a ranking function of one's own.

    optimize(model, selector=IDPruner(importance=0.3))          a method with options, see `methods.py`
    optimize(model, selector="idpruner")                        the same method, its options as they are by default
    optimize(model, selector=my_ranking)                        a function of one's own, see `rankings.py`
    optimize(model, selector=Ranking(my_ranking, {"power": 2.0}, portable=False))
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hawk_compile.errors import ConfigError
from hawk_compile.passes.insert_ranking import FORMER_NAMES, READABLE
from hawk_compile.settings.closest import meant
from hawk_compile.settings.methods import METHODS, OF_THIS_PACKAGE
from hawk_compile.settings.selector import RankingFunction, Selector, check_option_names, checked_option

RESERVED = ("all", "unpruned")
"""What `evaluate` calls all selectors, and none."""


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
        check_option_names("options", self.options, defaults, name)
        own = {each: checked_option(name, each, value, type(defaults[each])) for each, value in self.options.items()}
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "ranking", self.function)
        object.__setattr__(self, "options", {**defaults, **own})
        for parameter in inspect.signature(self.function).parameters:
            if parameter in FORMER_NAMES and parameter not in defaults:
                now = FORMER_NAMES[parameter]
                warn_of_old_spelling(f"ranking {name} reads {parameter}, which is deprecated: name its parameter {now}")

    @property
    def defaults(self) -> dict[str, Any]:
        return options_of(self.function)


def options_of(function: RankingFunction) -> dict[str, Any]:
    """The options of a ranking function with their defaults.

    Raises:
        ConfigError: it is none.
    """
    if not inspect.isfunction(function) or not function.__name__.isidentifier():
        raise ConfigError(f"ranking must be a function with a name (def), got {function!r}: give one")
    parameters = inspect.signature(function).parameters.values()
    readable = {*READABLE, *FORMER_NAMES}
    unknown = [each.name for each in parameters if each.default is each.empty and each.name not in readable]
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


def selector_of(setting: Any) -> Selector:
    """The selector that a setting means: a name, a ranking function, or a selector.

    Raises:
        ConfigError: something else.
    """
    if isinstance(setting, Selector):
        return setting
    if inspect.isfunction(setting):
        return Ranking(setting)
    if not isinstance(setting, str) or setting not in SELECTORS:
        raise ConfigError(
            f"selector must be one of {', '.join(SELECTORS)}, a selector of hawk_compile.selectors, such as "
            f"selectors.DART(pivots=8), or a ranking function, got {setting!r}{meant(setting, SELECTORS)}"
        )
    return SELECTORS[setting]


def selector_named(name: str, options: Mapping[str, Any]) -> Selector:
    """The selector of a name with options from JSON, as manifests and command lines have them.

    Raises:
        ConfigError: an unknown name, or options that it does not have.
    """
    return with_options(selector_of(name), options)


def selector_from_json(value: Any) -> Any:
    """The selector that {"name": "idpruner", "importance": 0.3} means; whatever else was given, as it is.

    Raises:
        ConfigError: an object without a name, an unknown one, or options that it does not have.
    """
    if not isinstance(value, Mapping):
        return value
    if not isinstance(name := value.get("name"), str):
        raise ConfigError(f'selector must be a name, or hold one as {{"name": "idpruner"}}, got {value!r}')
    return selector_named(name, {option: given for option, given in value.items() if option != "name"})


def with_options(selector: Selector, options: Any) -> Selector:
    check_option_names("selector_options", options, selector.options, selector.name)
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


SELECTORS: dict[str, Selector] = {}
"""Selectors by name: those of this package with their options as they are by default, and what was registered."""
SELECTORS.update((method.name, method()) for method in METHODS)
