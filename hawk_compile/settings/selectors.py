"""Selectors by name: how the visual tokens of a prompt are ranked; every row keeps its best.

A ranking is a function of tensors, [B, S] float: the visual tokens with the highest values are kept, ties in favour of
the lower position, and what stands elsewhere does not matter. It reads what its parameters name:

    scores       [B, S] float32: the HAWK score of every visual token, 0 elsewhere
    embeddings   [B, S, D]: the prompt at the decoder's input, visual features among the token embeddings
    visual_mask  [B, S] bool: real visual tokens
    votes        [B, S] bool: the text that votes
    budget       [B] int64: visual tokens that each row keeps

Parameters with a default are options: numbers, text or flags that a user may set, part of the compiled graph. A ranking
runs inside that graph, so it is traced: tensor code without shapes that depend on data. Sources and definitions of the
methods: docs/selectors.md.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hawk_compile.kernels.greedy.op  # noqa: F401  registers the operator
from hawk_compile.errors import ConfigError
from hawk_compile.kernels.greedy.reference import unit_range
from hawk_compile.passes.insert_ranking import READABLE

Ranking = Callable[..., Tensor]


@dataclass(frozen=True)
class Selector:
    """How visual tokens are ranked.

    Attributes:
        ranking: see above; None: by the HAWK score itself.
        query, normalization, contrast: of the HAWK score, if the settings do not say.
        head_weights: "uniform" where the method knows no head weights; None: as the settings say.
        portable: whether the ranking can be exported: it consists of PyTorch's own operators.
        bounds: least and largest values of options that have any.
    """

    ranking: Ranking | None = None
    query: str = "mean"
    normalization: str = "l2"
    contrast: float = 0.0
    head_weights: str | None = None
    portable: bool = True
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The ranking's options with their defaults."""
        parameters = inspect.signature(self.ranking).parameters if self.ranking is not None else {}
        return {name: each.default for name, each in parameters.items() if each.default is not each.empty}


def divprune(embeddings: Tensor, visual_mask: Tensor, budget: Tensor) -> Tensor:
    importance = torch.zeros_like(visual_mask, dtype=torch.float32)
    return torch.ops.hawk.greedy_order(embeddings, importance, visual_mask, budget, "max_min", 0.0)


def idpruner(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, budget: Tensor, *, importance: float = 0.5
) -> Tensor:
    return torch.ops.hawk.greedy_order(embeddings, scores, visual_mask, budget, "mmr", importance)


def cdpruner(embeddings: Tensor, visual_mask: Tensor, votes: Tensor, budget: Tensor) -> Tensor:
    """Relevance is the likeness to the text; the paper takes it from CLIP's text encoder."""
    return torch.ops.hawk.greedy_order(embeddings, likeness_to_text(embeddings, votes), visual_mask, budget, "dpp", 0.0)


def likeness_to_text(embeddings: Tensor, votes: Tensor) -> Tensor:
    """[B, S]: the cosine of every token to the voting text's mean embedding."""
    text = (embeddings.float() * votes.unsqueeze(2)).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(embeddings.float(), text, dim=2)


def hawk_diverse(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, votes: Tensor, budget: Tensor, *, likeness: float = 0.5
) -> Tensor:
    """The weighted geometric mean of the HAWK score and the likeness to the text, both in [0, 1], as relevance against
    what is kept already."""
    score, like = (unit_range(each, visual_mask) for each in (scores, likeness_to_text(embeddings, votes)))
    relevance = score ** (1 - likeness) * like**likeness
    return torch.ops.hawk.greedy_order(embeddings, relevance, visual_mask, budget, "dpp", 0.0)


def dart(embeddings: Tensor, visual_mask: Tensor, votes: Tensor, *, pivots: int = 4) -> Tensor:
    """Pivots are the visual and the voting text tokens of the largest L1 norm; what resembles them least is kept."""
    size = embeddings.float().abs().sum(2)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    found = []
    for mask in (visual_mask, votes):
        left = size.masked_fill(~mask, -1.0)
        for _ in range(pivots):  # no sort, which not every runtime has, nor for prompts of any length
            found.append(left.max(1, keepdim=True))
            left = left.scatter(1, found[-1].indices, -1.0)
    largest, chosen = torch.cat([each.values for each in found], 1), torch.cat([each.indices for each in found], 1)
    similar = unit @ unit.gather(1, chosen.unsqueeze(2).expand(-1, -1, unit.shape[2])).transpose(1, 2)
    similar = similar.masked_fill((largest < 0).unsqueeze(1), -1.0)  # fewer tokens than pivots
    itself = torch.zeros_like(size).scatter(1, chosen[:, :pivots], 1.0)
    return 2 * itself - similar.amax(2)


def qapruner(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, *, bits: int = 4, group: int = 32,
    error_weight: float = 0.25, outlier_weight: float = 0.25,
) -> Tensor:  # fmt: skip
    """The HAWK score, raised where quantisation in groups of channels changes a token much, and for outliers."""
    values = embeddings.float()
    grouped = values.unflatten(2, (-1, group))
    largest = grouped.abs().amax(3, keepdim=True).clamp_min(1e-12)
    levels = 2 ** (bits - 1) - 1
    rounded = (grouped / largest * levels).round() / levels * largest
    error = (grouped - rounded).flatten(2).norm(dim=2) / values.norm(dim=2).clamp_min(1e-12)
    outlier = values.abs().amax(2) / values.abs().mean(2).clamp_min(1e-12)
    relevance, error, outlier = (unit_range(each, visual_mask) for each in (scores, error, outlier))
    return relevance + error_weight * error + outlier_weight * outlier


def norm(embeddings: Tensor) -> Tensor:
    """How long a token's embedding is: a control that looks at no question and at no other token."""
    return embeddings.float().norm(dim=2)


def random(embeddings: Tensor, *, seed: int = 0) -> Tensor:
    """Noise that is the same for the same prompt and seed: a hash of each token's position and first channel."""
    length = embeddings.shape[1]
    bits = embeddings[..., 0].float().view(torch.int32).long()
    mixed = bits * 2654435761 + (torch.arange(length, device=embeddings.device) + seed * 1_000_003 + 1) * 40503
    mixed = (mixed ^ mixed << 13) & 0xFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 7) & 0xFFFFFFFFFFFF
    mixed = (mixed ^ mixed << 17) & 0xFFFFFFFFFFFF
    return (mixed & 0xFFFFFF).float()


def stride(visual_mask: Tensor, budget: Tensor) -> Tensor:
    """Visual tokens at equal distances."""
    rank = visual_mask.long().cumsum(1)
    total = rank[:, -1:].clamp_min(1)
    kept = budget.unsqueeze(1)
    return ((rank * kept) // total > ((rank - 1) * kept) // total).float()


def register_selector(name: str, ranking: Ranking, *, portable: bool = True) -> None:
    """Let `selector=name` rank visual tokens by a function of one's own; see this module for what it reads and returns.

    Args:
        name: an identifier, not that of another selector, unless of the same function or one defined in its place.
        ranking: a function with a name of its own, whose options have defaults (int, float, str or bool).
        portable: whether it consists of operators that other runtimes know, so that `export` may take it.

    Raises:
        ConfigError: a name that is taken, something that is no function, or a parameter that nothing can fill.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
        raise ConfigError(f"name must be an identifier other than {' and '.join(RESERVED)}, got {name!r}")
    if name in SELECTORS and not same_function(SELECTORS[name].ranking, ranking):
        raise ConfigError(f"name {name!r} is that of another selector: choose another one")
    if not inspect.isfunction(ranking) or not ranking.__name__.isidentifier():
        raise ConfigError(f"ranking must be a function with a name (def), got {ranking!r}")
    parameters = inspect.signature(ranking).parameters.values()
    unknown = [each.name for each in parameters if each.default is each.empty and each.name not in READABLE]
    if unknown:
        raise ConfigError(
            f"ranking {ranking.__name__} reads {', '.join(unknown)}; there are {', '.join(READABLE)}, and options need "
            "a default"
        )
    options = {each.name: each.default for each in parameters if each.default is not each.empty}
    if wrong := [option for option, default in options.items() if not isinstance(default, (int, float, str))]:
        raise ConfigError(
            f"ranking {ranking.__name__} has options that are no int, float, str or bool: {', '.join(wrong)}; give "
            "them such a default"
        )
    SELECTORS[name] = Selector(ranking, portable=portable)


def same_function(one: Ranking | None, other: Any) -> bool:
    """Whether one is the other, or a function defined again in its place, as in a notebook."""
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (one, other)]
    return one is other or (one is not None and names[0] == names[1] and names[0][0] != __name__)


RESERVED = ("all", "unpruned")
"""What `evaluate` calls all of them, and none."""

SELECTORS: dict[str, Selector] = {
    "hawk": Selector(),
    "uniform": Selector(head_weights="uniform"),
    "hawk_each": Selector(query="each", normalization="softmax"),
    "hawk_content": Selector(query="content", normalization="softmax"),
    "hawk_contrast": Selector(query="each", normalization="softmax", contrast=0.5),
    "fastv": Selector(query="last", head_weights="uniform", normalization="softmax"),
    "divprune": Selector(divprune, portable=False),
    "idpruner": Selector(idpruner, portable=False, bounds={"importance": (0, 1)}),
    "cdpruner": Selector(cdpruner, portable=False),
    "hawk_diverse": Selector(
        hawk_diverse, query="each", normalization="softmax", portable=False, bounds={"likeness": (0, 1)}
    ),
    "dart": Selector(dart, bounds={"pivots": (1, math.inf)}),
    "qapruner": Selector(qapruner, bounds={"bits": (2, 16), "group": (1, math.inf)}),
    "norm": Selector(norm),
    "random": Selector(random, portable=False, bounds={"seed": (0, 2**31 - 1)}),
    "stride": Selector(stride),
}
