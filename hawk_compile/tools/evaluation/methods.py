"""What `evaluate` compares: methods, each at every ratio, and the model without pruning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hawk_compile.errors import ConfigError
from hawk_compile.settings.config import HawkConfig, changed
from hawk_compile.settings.methods import Stride
from hawk_compile.settings.selector import RankingFunction, Selector
from hawk_compile.settings.selectors import SELECTORS, selector_of

UNPRUNED = "unpruned"

Methods = Mapping[str, Mapping[str, Any]]
"""Label -> settings of `optimize`, but for the ratio."""
Selectable = str | Selector | RankingFunction


@dataclass(frozen=True)
class Cell:
    """One method at one ratio; `config` None is the model without pruning.

    Attributes:
        timed: the settings under which its prefill is timed.
    """

    method: str
    ratio: float
    config: HawkConfig | None
    timed: HawkConfig


def cells_of(methods: Mapping[str, HawkConfig], ratios: Sequence[float]) -> list[Cell]:
    """The unpruned model, then every method at each ratio.

    What the unpruned one is timed under is compiled as the others are, at ratio 0, by a ranking that costs nothing.
    """
    first = next(iter(methods.values()))
    plain = HawkConfig(ratio=0.0, selector=Stride(), backend=first.backend, modalities=first.modalities)
    cells = [Cell(UNPRUNED, 0.0, None, plain)]
    for label, config in methods.items():
        for ratio in dict.fromkeys(ratios):
            own = replace(config, ratio=ratio)
            cells.append(Cell(label, ratio, own, own))
    return cells


def methods_of(selectors: "Selectable | Sequence[Selectable] | Methods", config: HawkConfig) -> dict[str, HawkConfig]:
    """Label -> settings, from selectors or ready ones.

    Raises:
        ConfigError: no method, two of one name, one that sets the ratio, or settings that cannot be.
    """
    if isinstance(selectors, Mapping):
        methods = {label: method_of(label, config, settings) for label, settings in selectors.items()}
    else:
        methods = {}
        named: Any = list(SELECTORS) if selectors == "all" else selectors
        single = isinstance(named, str) or not isinstance(named, Sequence)
        for selector in map(selector_of, [named] if single else named):
            label = str(selector)
            if label in methods and methods[label].method != selector:
                raise ConfigError(f"selectors must have different names, got {label} twice: give one of them another")
            head_weights = "auto" if selector.head_weights else config.head_weights  # which some fix
            methods[label] = replace(config, selector=selector, head_weights=head_weights)
    if not methods:
        raise ConfigError(f"selectors must name at least one of {', '.join(SELECTORS)}, got none")
    return methods


def method_of(label: str, config: HawkConfig, settings: Mapping[str, Any]) -> HawkConfig:
    if label == UNPRUNED or "ratio" in settings:
        raise ConfigError(
            f'a method must not be called "{UNPRUNED}" nor set ratio, got {label!r}: {dict(settings)}; call it '
            "otherwise, and give ratios beside the methods"
        )
    return changed(config, settings)
