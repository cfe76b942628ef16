"""Insert the HAWK score of every visual token in front of the decoder (HAWK, arXiv 2604.07812).

    before: merged [B, S, D] | normed = norm(merged); q = linear(normed, Wq); k = linear(normed, Wk); ...
    after:  merged [B, S, D]
            mask   [B, S]    = merge masks, joined; or what the plan says may be removed
            normed [B, S, D] = norm(merged)                                    a copy, at full length
            scores [B, S]    = hawk.score_folded(normed, mask, votes, Wq, bq, Wk, bk, w)
            | normed = norm(merged); ...                                       untouched

Where anything but layout stands between projection and position (a query/key norm, an adapter), the copy reaches up to
that point and the score is `hawk.score_projected(query, key, mask, votes, w)`. Where every voting token is scored by
itself, it is `hawk.score_each(query of the voters, key, mask, ...)` in both cases. The rest of the graph is
unchanged.

In a tensor-parallel model each rank has some of the heads: it scores by these, and the sum over the ranks, the same on
all of them, is the score.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed._functional_collectives import all_reduce

import hawk_compile.kernels.gather.op
import hawk_compile.kernels.score.op  # noqa: F401  both register operators
from hawk_compile.kernels.score.voters import last_vote, last_voters, split_heads
from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import Builder, ancestors, expr, is_call, same, shape_of, sizes_equal_to, tensor
from hawk_compile.passes.site import Site, site_of


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the heads of a layer, in their order."""

    group: str
    """The name of their process group."""
    rank: int
    size: int


def insert_scoring(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    normalization: str = "l2",
    head_weights: Tensor | None = None,
    query: str = "mean",
    ranks: Ranks | None = None,
) -> fx.GraphModule:
    """Insert the scores; `site.scores` names them.

    Args:
        normalization: 'l2', 'softmax' or 'minmax': how a head's raw relevance is normalised over the visual tokens.
        head_weights: [H] float32, for graphs whose caller put no `hawk::plan` beside the model. None: equal weights.
        query: 'mean': the mean query of all that vote; 'last': without a plan, the last token's; 'each' or 'content':
            see `hawk_compile.kernels.score.voters`.
        ranks: of a tensor-parallel model.

    Raises:
        GraphError: `head_weights` does not have one weight per query head, or `query` needs all heads at once.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if site.scores is not None:
        return gm
    build = Builder(gm, site.boundary)
    site.visual_mask = site.planned("candidates") or join_masks(build, site)
    site.token_mask = real_tokens(build, site)
    votes = site.plan.args[0] if site.plan is not None else text_after_images(build, site, query == "last")
    site.votes = votes
    weights = site.plan.args[2] if site.plan is not None else constant_weights(gm, build, site, head_weights)
    shared = ranks is not None and shape_of(weights)[0] == site.heads * ranks.size
    if ranks is not None and shared:
        if query == "content":
            raise GraphError(
                'query="content" weighs voters by all heads at once, of which a tensor-parallel model has some on each '
                'rank: take "each"'
            )
        weights = build.call(torch.narrow, weights, 0, ranks.rank * site.heads, site.heads)
    check_heads(weights, site)
    copies = projections(build, site) if site.form == "folded" else heads_first(build, site)
    if query in ("each", "content"):
        site.scores = insert_each(build, site, copies, weights, normalization, query == "content")
    else:
        site.scores = insert_mean(build, site, copies, votes, weights, normalization)
    if ranks is not None and shared:
        site.scores = build.call(all_reduce, site.scores, "sum", ranks.group)
    return gm


def join_masks(build: Builder, site: Site) -> fx.Node:
    """[B, S] bool: the positions that any merge fills."""
    masks = [build.call(torch.ops.aten.select.int, merge.args[1], -1, 0) for merge in site.merges]
    joined = masks[0]
    for mask in masks[1:]:
        joined = build.call(torch.bitwise_or, joined, mask)
    return joined


def real_tokens(build: Builder, site: Site) -> fx.Node:
    """[B, S] bool: what is not padding."""
    if site.padding_mask is None:
        return build.call(torch.ones_like, site.visual_mask)
    return build.call(torch.ne, site.padding_mask, 0)


def text_after_images(build: Builder, site: Site, last: bool) -> fx.Node:
    """[B, S] bool: the text behind the last visual token of each row; where there is none, all of the row's text.
    Or the `last` token of that alone."""
    text = build.call(torch.logical_and, site.token_mask, build.call(torch.logical_not, site.visual_mask))
    ahead = build.call(torch.cumsum, build.call(torch.flip, site.visual_mask, (1,)), 1)
    behind = build.call(torch.eq, build.call(torch.flip, ahead, (1,)), 0)
    after = build.call(torch.logical_and, text, behind)
    votes = build.call(torch.where, build.call(torch.any, after, 1, True), after, text)
    return build.call(last_vote, votes) if last else votes


def constant_weights(gm: fx.GraphModule, build: Builder, site: Site, head_weights: Tensor | None) -> fx.Node:
    like = site.scores if site.scores is not None else site.merged
    device = tensor(like).device  # type: ignore[union-attr]
    if head_weights is None:
        return build.call(torch.full, (site.heads,), 1.0 / site.heads, dtype=torch.float32, device=device)
    return build.call(torch.tensor, head_weights.tolist(), dtype=torch.float32, device=device)


def check_heads(weights: Any, site: Site) -> None:
    found = tensor(weights)
    if found is None or not same(found.shape[0], site.heads):
        given = None if found is None else found.shape[0]
        raise GraphError(
            f"head_weights has {given} entries, but the first attention of this model, {site.attention.name}, has "
            f"{site.heads} query heads: give one weight per query head"
        )


def argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def insert_mean(
    build: Builder, site: Site, copies: list[Any], votes: Any, weights: Any, normalization: str
) -> fx.Node:
    """Scores by the mean query of what votes."""
    if site.form == "folded":
        hidden, *parameters = copies
        score = torch.ops.hawk.score_folded.default
        return build.call(score, hidden, site.visual_mask, votes, *parameters, weights, normalization)
    score = torch.ops.hawk.score_projected.default
    return build.call(score, *copies, site.visual_mask, votes, weights, normalization)


def insert_each(
    build: Builder, site: Site, copies: list[Any], weights: Any, normalization: str, specific: bool
) -> fx.Node:
    """Queries are made of the voters alone where the form allows it; keys of all positions, as the decoder does."""
    voters = build.call(last_voters, build.call(torch.ne, site.votes, 0))
    positions, real = build.item(voters, 0), build.item(voters, 1)
    gather = torch.ops.hawk.gather.default
    if site.form == "folded":
        hidden, q_weight, q_bias, k_weight, k_bias = copies
        query = build.call(split_heads, build.call(gather, hidden, positions), q_weight, q_bias, site.head_dim)
        key = build.call(split_heads, hidden, k_weight, k_bias, site.head_dim)
    else:
        query, key = copies
        rows = build.call(gather, build.call(torch.transpose, query, 1, 2), positions)
        query = build.call(torch.transpose, rows, 1, 2)
    score = torch.ops.hawk.score_each.default
    return build.call(score, query, key, site.visual_mask, real, weights, normalization, specific)


def projections(build: Builder, site: Site) -> list[Any]:
    """Copies at full length of: hidden [B, S, D], query weight and bias, key weight and bias."""
    assert site.normed is not None and site.query_linear is not None and site.key_linear is not None
    parameters = [
        argument(linear, *which)
        for linear in (site.query_linear, site.key_linear)
        for which in ((1, "weight"), (2, "bias"))
    ]
    needed = ancestors(site.normed, *(node for node in parameters if isinstance(node, fx.Node))) - site.full
    copies = build.clone(needed, {})
    return [copies.get(node, node) for node in (site.normed, *parameters)]


def heads_first(build: Builder, site: Site) -> list[fx.Node]:
    """Copies at full length of query [B, H, S, d] and key [B, Hkv, S, d], before position enters them."""
    needed = ancestors(site.query, site.key, replaced=site.rotated)
    copies = build.clone(needed - site.full, site.rotated)
    return [this_prompt(build, site, copies[node]) for node in (site.query, site.key)]


def this_prompt(build: Builder, site: Site, node: fx.Node) -> fx.Node:
    """Heads first, and without what a filled cache holds in front of the prompt.

    Raises:
        GraphError: it cannot be told that the prompt's own positions are the last ones.
    """
    shape = shape_of(node)
    if same(shape[2], site.length):
        return node
    if same(shape[1], site.length):
        return build.call(torch.transpose, node, 1, 2)
    joins = [
        source.args[0][-1]  # type: ignore[index]
        for source in ancestors(node)
        if is_call(source, "cat") and sizes_equal_to(shape_of(source), shape[2])
    ]
    if not joins or not all(isinstance(last, fx.Node) and site.merged in ancestors(last) for last in joins):
        raise GraphError(
            f"the first attention, {site.attention.name}, has a {site.key.name} of {expr(shape[2])} positions for a "
            f"prompt of {expr(site.length)}, and it cannot be told which of them are the prompt's: start the turn with "
            "an empty cache"
        )
    length = build.size_of(site.merged, 1)
    past = build.size(operator.sub, build.size_of(node, 2), length)
    return build.call(torch.narrow, node, 2, past, length)
