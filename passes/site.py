"""What the passes know of a prefill's graph: one frozen record for each pass that finds or inserts something.

They lie in `GraphModule.meta`. A pass reads the records of those before it by type, so it cannot read what is not there
yet, and finds its own where it has run already.

Shapes use B rows, S positions, V visual tokens over all rows, D width, H query heads, Hkv KV heads, d head width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import fx

import hawk_compile.kernels.plan.op  # noqa: F401  registers the operator
from hawk_compile.passes.compat import schema_of
from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import Size, same

KEY = "hawk_site"
"""Where the records stand in `GraphModule.meta`, by type."""


@dataclass(frozen=True)
class Located:
    """The places in one graph between which visual tokens are pruned."""

    by: ClassVar[str] = "locate_prefill"
    merged: fx.Node
    """[B, S, D]: the token embeddings after the last merge."""
    merges: tuple[fx.Node, ...]
    """Every masked_scatter of the chain, first to last."""
    entry: fx.Node
    """[B, S, ...]: what is gathered: `merged`, or where tokens meet without keys before the first attention, the
    residual stream in front of that attention's layer."""
    layer: int
    """The decoder layer of that attention, counted from 0; 0 where a graph does not say."""
    rows: Any
    length: Any
    """S as the graph writes it: a SymInt, or a number where the graph is specialised."""
    visual: tuple[Any, ...]
    """The number of visual tokens of each merge, in the order of `merges`."""
    padding_mask: fx.Node | None
    """[B, S] input that marks real tokens, if the graph has one."""
    attention: fx.Node
    query: fx.Node
    """[B, H, S, d] or [B, S, H, d]: the queries of the first attention just before position enters them; where a norm
    stands behind that, those behind it, to be computed without position (`rotated`)."""
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
    """The `hawk::plan` marker, if the caller put one; `insert_selection` takes it out of the graph."""
    position_chain: frozenset[fx.Node]
    """Positions the graph counts itself (arange over S): they stay at full length, so that kept tokens keep theirs."""

    def planned(self, name: str) -> Any:
        """An argument of the plan that may be left out; None without it, and without a plan."""
        if self.plan is None:
            return None
        names = [argument.name for argument in schema_of(torch.ops.hawk.plan.default).arguments]
        arguments = dict(zip(names, self.plan.args, strict=False)) | self.plan.kwargs
        return arguments.get(name)

    @property
    def ambiguous(self) -> bool:
        """Whether S and a V are one symbol: Dynamo gives equal sizes of its first call one, and in a batch both can be
        equal. Dynamo then guards that they are, so the graph is right; but no shape tells features from tokens."""
        return any(same(count, self.length) for count in self.visual)


@dataclass(frozen=True)
class Split:
    """The graph in two: full length in front, pruned length behind."""

    by: ClassVar[str] = "split_at_merge"
    full: frozenset[fx.Node]
    """The nodes that stay at full length: the merge, what it depends on, and checks of the inputs."""
    boundary: fx.Node
    """The first node that runs at the pruned length."""


@dataclass(frozen=True)
class Scored:
    by: ClassVar[str] = "insert_scoring"
    visual_mask: fx.Node
    """[B, S] bool: the visual tokens that may be removed."""
    token_mask: fx.Node
    """[B, S] bool: what is not padding."""
    question_mask: Any
    """[B, S]: which text votes on the visual tokens, or how much."""
    scores: fx.Node
    """[B, S] float32. A selector that does not read them takes them out of the graph again: see `Ranked`."""


@dataclass(frozen=True)
class Budgeted:
    by: ClassVar[str] = "insert_budget"
    budget: fx.Node
    """[B]: how many visual tokens each row keeps."""
    kept_length: Size
    """S'."""
    kept_visual: Size
    """V', the visual tokens kept over all rows."""


@dataclass(frozen=True)
class Ranked:
    by: ClassVar[str] = "insert_ranking"
    scores: fx.Node
    """[B, S]: the scores of visual tokens, or a selector's ranking in their place."""
    tie_scores: fx.Node
    """[B, S]: by which the tokens that each image is guaranteed are chosen: the scores behind a ranking, where the plan
    has such floors."""


@dataclass(frozen=True)
class Ordered:
    by: ClassVar[str] = "insert_quotas"
    ranks: fx.Node
    """[B, S]: what visual tokens are chosen by: some images' tokens go first, where the plan says so."""


@dataclass(frozen=True)
class Selected:
    by: ClassVar[str] = "insert_selection"
    keep: fx.Node
    """[B, S'] int64 positions."""
    valid: fx.Node
    """[B, S'] bool: False where a position only fills the row up."""


@dataclass(frozen=True)
class Gathered:
    by: ClassVar[str] = "gather_by_shape"
    values: tuple[tuple[str, tuple[Any, ...], str], ...]
    """(value, shape, 'tokens' | 'visual tokens' | 'length') of everything that was gathered."""


Record = TypeVar("Record", Located, Split, Scored, Budgeted, Ranked, Ordered, Selected, Gathered)


def find(gm: fx.GraphModule, kind: type[Record]) -> Record | None:
    """What a pass has noted, or None if it has not run on this graph."""
    return gm.meta.get(KEY, {}).get(kind)


def read(gm: fx.GraphModule, kind: type[Record]) -> Record:
    """What a pass has noted.

    Raises:
        GraphError: it has not run on this graph.
    """
    record = find(gm, kind)
    if record is None:
        raise GraphError(f"a pass needs {kind.by} in front of it, which has not run on this graph: put it in the list")
    return record


def note(gm: fx.GraphModule, record: Any) -> None:
    """Let later passes read this record."""
    gm.meta[KEY] = gm.meta.get(KEY, {}) | {type(record): record}
