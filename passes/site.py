"""What the passes know of a prefill's graph: written by `locate_prefill`, read by the others."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

import hawk_compile.kernels.plan.op  # noqa: F401  registers the operator
from hawk_compile.passes.graph import Size, same

KEY = "hawk_site"
"""Where the site stands in `GraphModule.meta`."""


@dataclass
class Site:
    """The places in one graph between which visual tokens are pruned.

    Shapes use B rows, S positions, V visual tokens over all rows, D width, H query heads, Hkv KV heads, d head width.
    """

    merged: fx.Node
    """[B, S, D]: the token embeddings after the last merge."""
    merges: list[fx.Node]
    """Every masked_scatter of the chain, first to last."""
    rows: Any
    length: Any
    """S as the graph writes it: a SymInt, or a number where the graph is specialised."""
    visual: list[Any]
    """The number of visual tokens of each merge, in the order of `merges`."""
    padding_mask: fx.Node | None
    """[B, S] input that marks real tokens, if the graph has one."""
    attention: fx.Node
    query: fx.Node
    """[B, H, S, d] or [B, S, H, d]: the queries of the first attention just before position enters them."""
    key: fx.Node
    rotated: dict[fx.Node, fx.Node]
    """What position has entered on the way to `query` and `key`, and what to compute them with in its place."""
    normed: fx.Node | None
    """[B, S, D]: what the query and key projections read; None if they do not read one value."""
    form: Literal["folded", "projected"]
    heads: int
    kv_heads: int
    head_dim: int
    query_linear: fx.Node | None
    key_linear: fx.Node | None
    between: tuple[str, ...]
    """Operators between projection and position that are not mere layout: why the form is 'projected'."""
    plan: fx.Node | None
    """The `hawk::plan` marker, if the caller put one."""
    position_chain: set[fx.Node] = field(default_factory=set)
    """Positions the graph counts itself (arange over S): they stay at full length, so that kept tokens keep theirs."""
    full: set[fx.Node] = field(default_factory=set)
    """The nodes that stay at full length: the merge, what it depends on, and checks of the inputs."""
    boundary: fx.Node | None = None
    """The first node that runs at the pruned length."""
    visual_mask: fx.Node | None = None
    token_mask: fx.Node | None = None
    votes: Any = None
    """[B, S]: which text votes on the visual tokens, or how much."""
    scores: fx.Node | None = None
    """[B, S]: the scores of visual tokens, or a selector's ranking in their place."""
    ranked: bool = False
    """Whether a selector's ranking has taken the place of the scores."""
    hawk_scores: fx.Node | None = None
    """The scores behind a ranking, where something still reads them."""
    ranks: fx.Node | None = None
    """[B, S]: what visual tokens are chosen by, where that is not `scores`: some images' tokens go first."""
    budget: fx.Node | None = None
    """[B]: how many visual tokens each row keeps."""
    keep: fx.Node | None = None
    valid: fx.Node | None = None
    kept_length: Size = 0
    """S', once it is known."""
    kept_visual: Size = 0
    """V', the visual tokens kept over all rows, once it is known."""
    gathered: list[tuple[str, tuple[Any, ...], str]] = field(default_factory=list)
    """(value, shape, 'tokens' | 'visual tokens' | 'length') of everything that was gathered."""

    def planned(self, name: str) -> Any:
        """An argument of the plan that may be left out; None without it, and without a plan."""
        if self.plan is None:
            return None
        names = [each.name for each in torch.ops.hawk.plan.default._schema.arguments]
        given = dict(zip(names, self.plan.args, strict=False)) | self.plan.kwargs
        return given.get(name)

    @property
    def ambiguous(self) -> bool:
        """Whether S and a V are one symbol: Dynamo gives equal sizes of its first call one, and in a batch both can be
        equal. Dynamo then guards that they are, so the graph is right; but no shape tells features from tokens."""
        return any(same(count, self.length) for count in self.visual)


def site_of(gm: fx.GraphModule) -> Site | None:
    """The graph's site, or None where nothing was located."""
    return gm.meta.get(KEY)
