"""The selectors of this package, a class for each method, its options as fields; see docs/selectors.md."""

import math
from dataclasses import dataclass

from hawk_compile.settings import rankings
from hawk_compile.settings.selector import Selector, bounded


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


METHODS = (
    Hawk, Uniform, HawkEach, HawkContent, FastV, DivPrune, IDPruner, CDPruner, HawkDiverse, DART, QAPruner, Norm,
    Random, Stride,
)  # fmt: skip
OF_THIS_PACKAGE = tuple(method.name for method in METHODS)
