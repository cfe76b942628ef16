"""Selectors with options of their own, for `selector=`.

    from hawk_compile import selectors

    hawk_compile.optimize(model, ratio=0.8, selector=selectors.IDPruner(importance=0.3))
    hawk_compile.optimize(model, ratio=0.8, selector=selectors.Ranking(my_function, {"power": 2.0}, portable=False))

What each does: docs/selectors.md. What a function may read: `hawk_compile.settings.rankings`.
"""

from hawk_compile.settings.methods import (
    DART,
    CDPruner,
    DivPrune,
    FastV,
    Hawk,
    HawkContent,
    HawkDiverse,
    HawkEach,
    IDPruner,
    Norm,
    QAPruner,
    Random,
    Stride,
    Uniform,
)
from hawk_compile.settings.selector import Selector
from hawk_compile.settings.selectors import Ranking

__all__ = [
    "DART",
    "CDPruner",
    "DivPrune",
    "FastV",
    "Hawk",
    "HawkContent",
    "HawkDiverse",
    "HawkEach",
    "IDPruner",
    "Norm",
    "QAPruner",
    "Random",
    "Ranking",
    "Selector",
    "Stride",
    "Uniform",
]
