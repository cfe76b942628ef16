"""Insert the HAWK score of every visual token in front of the decoder (HAWK, arXiv 2604.07812).

    before: merged [B, S, D] | normed = norm(merged); q = linear(normed, Wq); k = linear(normed, Wk); ...
    after:  merged [B, S, D]
            mask   [B, S]    = merge masks, joined; or what the plan says may be removed
            normed [B, S, D] = norm(merged)                                    a copy, at full length
            scores [B, S]    = hawk.score_folded(normed, mask, question_mask, Wq, bq, Wk, bk, w)
            | normed = norm(merged); ...                                       untouched

Where anything but layout stands between projection and position (a query/key norm, an adapter), the copy reaches up to
that point and the score is `hawk.score_projected(query, key, mask, question_mask, w)`. Where every token of the
question is scored by itself, it is `hawk.score_each(query of the question, key, mask, ...)` in both cases. The rest of
the graph is unchanged.

Where images have questions of their own, G in a row, each row is scored G times, by one question over its own visual
tokens, and what was scored is put together again: the visual tokens of two questions have none in common.

In a tensor-parallel model each rank has some of the heads: it scores by these, and the sum over the ranks, the same on
all of them, is the score.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import hawk_compile.kernels.gather.op
import hawk_compile.kernels.score.op  # noqa: F401  both register operators
from hawk_compile.kernels.score.by_token import last_of_question, last_token, split_heads
from hawk_compile.passes.compat import all_reduce
from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import (
    Builder,
    ancestors,
    argument,
    expr,
    is_call,
    same,
    shape_of,
    sizes_equal_to,
    tensor,
)
from hawk_compile.passes.site import Located, Scored, Split, find, note, read


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
    """Insert the scores, and note them.

    Args:
        normalization: 'l2', 'softmax' or 'minmax': how a head's raw relevance is normalised over the visual tokens.
        head_weights: [H] float32, for graphs whose caller put no `hawk::plan` beside the model. None: equal weights.
        query: 'mean': the mean query of the question; 'last': without a plan, the last token's; 'each' or 'content':
            see `hawk_compile.kernels.score.by_token`.
        ranks: of a tensor-parallel model.

    Raises:
        GraphError: `head_weights` does not have one weight per query head, or `query` needs all heads at once.
    """
    if find(gm, Scored) is not None:
        return gm
    located, split = read(gm, Located), read(gm, Split)
    build = Builder(gm, split.boundary)
    visual_mask = located.planned("candidates") or join_masks(build, located)
    token_mask = real_tokens(build, located, visual_mask)
    plan = located.plan
    if plan is not None:
        question_mask = plan.args[0]
    else:
        question_mask = text_after_images(build, visual_mask, token_mask, query == "last")
    groups = located.planned("question_images")
    row_mask = question_mask if groups is None else build.call(torch.any, question_mask, 1)
    weights = plan.args[2] if plan is not None else constant_weights(build, located, head_weights)
    shared = ranks is not None and shape_of(weights)[0] == located.heads * ranks.size
    if ranks is not None and shared:
        if query == "content":
            raise GraphError(
                'query="content" weighs the question\'s tokens by all heads at once, of which a tensor-parallel model '
                'has some on each rank: take "each"'
            )
        weights = build.call(torch.narrow, weights, 0, ranks.rank * located.heads, located.heads)
    check_heads(weights, located)
    copies = projections(build, located, split) if located.form == "folded" else heads_first(build, located, split)
    visual: Any = visual_mask
    if groups is not None:
        rows = 1 if located.form == "folded" else 2  # hidden states, or query and key; what follows are weights
        copies = [*(build.call(for_each_question, each, groups) for each in copies[:rows]), *copies[rows:]]
        visual = build.call(visual_of_questions, visual, groups)
        question_mask = build.call(torch.flatten, question_mask, 0, 1)
    if query in ("each", "content"):
        scores = insert_each(build, located, copies, visual, question_mask, weights, normalization, query == "content")
    else:
        scores = insert_mean(build, located, copies, visual, question_mask, weights, normalization)
    if groups is not None:
        scores = build.call(sum_of_questions, scores, groups)
    if ranks is not None and shared:
        scores = build.call(all_reduce, scores, "sum", ranks.group)
    note(gm, Scored(visual_mask, token_mask, row_mask, scores))
    return gm


def join_masks(build: Builder, located: Located) -> fx.Node:
    """[B, S] bool: the positions that any merge fills."""
    masks = [build.call(torch.ops.aten.select.int, merge.args[1], -1, 0) for merge in located.merges]
    joined = masks[0]
    for mask in masks[1:]:
        joined = build.call(torch.bitwise_or, joined, mask)
    return joined


def real_tokens(build: Builder, located: Located, visual_mask: fx.Node) -> fx.Node:
    """[B, S] bool: what is not padding."""
    if located.padding_mask is None:
        return build.call(torch.ones_like, visual_mask)
    return build.call(torch.ne, located.padding_mask, 0)


def text_after_images(build: Builder, visual_mask: fx.Node, token_mask: fx.Node, last: bool) -> fx.Node:
    """[B, S] bool: what is taken for the question where no plan says which text it is.

    That is all text behind the last visual token of each row, chat template and role words included; where there is
    none, all of the row's text; or the `last` token of that alone. A graph has no ids and no turns to tell more by:
    `hawk_compile.optimize` plans it better, and puts a plan into the graph.
    """
    text = build.call(torch.logical_and, token_mask, build.call(torch.logical_not, visual_mask))
    ahead = build.call(torch.cumsum, build.call(torch.flip, visual_mask, (1,)), 1)
    behind = build.call(torch.eq, build.call(torch.flip, ahead, (1,)), 0)
    after = build.call(torch.logical_and, text, behind)
    question_mask = build.call(torch.where, build.call(torch.any, after, 1, True), after, text)
    return build.call(last_token, question_mask) if last else question_mask


def constant_weights(build: Builder, located: Located, head_weights: Tensor | None) -> fx.Node:
    device = tensor(located.merged).device  # type: ignore[union-attr]
    if head_weights is None:
        return build.call(torch.full, (located.heads,), 1.0 / located.heads, dtype=torch.float32, device=device)
    return build.call(torch.tensor, head_weights.tolist(), dtype=torch.float32, device=device)


def check_heads(weights: Any, located: Located) -> None:
    found = tensor(weights)
    if found is None or not same(found.shape[0], located.heads):
        given = None if found is None else found.shape[0]
        raise GraphError(
            f"head_weights has {given} entries, but the first attention of this model, {located.attention.name}, has "
            f"{located.heads} query heads: give one weight per query head"
        )


def for_each_question(rows: Tensor, groups: Tensor) -> Tensor:
    """[B * G, ...]: each row of [B, ...] once for each of its questions, [B, G, S]."""
    repeated = rows.unsqueeze(1).expand(-1, groups.shape[1], *rows.shape[1:])
    return repeated.flatten(0, 1)


def visual_of_questions(visual_mask: Tensor, groups: Tensor) -> Tensor:
    """[B * G, S] bool: the visual tokens [B, S] that each question scores."""
    return (groups & visual_mask.unsqueeze(1)).flatten(0, 1)


def sum_of_questions(scores: Tensor, groups: Tensor) -> Tensor:
    """[B, S]: the scores [B * G, S] of a row's questions, each of which is 0 where another scores."""
    return scores.unflatten(0, (groups.shape[0], groups.shape[1])).sum(1)


def insert_mean(
    build: Builder, located: Located, copies: list[Any], visual: Any, question_mask: Any, weights: Any,
    normalization: str,
) -> fx.Node:  # fmt: skip
    """Scores by the mean query of the question."""
    if located.form == "folded":
        hidden, *parameters = copies
        score = torch.ops.hawk.score_folded.default
        return build.call(score, hidden, visual, question_mask, *parameters, weights, normalization)
    score = torch.ops.hawk.score_projected.default
    return build.call(score, *copies, visual, question_mask, weights, normalization)


def insert_each(
    build: Builder, located: Located, copies: list[Any], visual: Any, question_mask: Any, weights: Any,
    normalization: str, specific: bool,
) -> fx.Node:  # fmt: skip
    """Queries are made of the question alone where the form allows it; keys of all positions, as the decoder does."""
    last = build.call(last_of_question, build.call(torch.ne, question_mask, 0))
    positions, real = build.item(last, 0), build.item(last, 1)
    gather = torch.ops.hawk.gather.default
    if located.form == "folded":
        hidden, q_weight, q_bias, k_weight, k_bias = copies
        query = build.call(split_heads, build.call(gather, hidden, positions), q_weight, q_bias, located.head_dim)
        key = build.call(split_heads, hidden, k_weight, k_bias, located.head_dim)
    else:
        query, key = copies
        rows = build.call(gather, build.call(torch.transpose, query, 1, 2), positions)
        query = build.call(torch.transpose, rows, 1, 2)
    score = torch.ops.hawk.score_each.default
    return build.call(score, query, key, visual, real, weights, normalization, specific)


def projections(build: Builder, located: Located, split: Split) -> list[Any]:
    """Copies at full length of: hidden [B, S, D], query weight and bias, key weight and bias."""
    assert located.normed is not None and located.query_linear is not None and located.key_linear is not None
    parameters = [
        argument(linear, *which)
        for linear in (located.query_linear, located.key_linear)
        for which in ((1, "weight"), (2, "bias"))
    ]
    needed = ancestors(located.normed, *(node for node in parameters if isinstance(node, fx.Node))) - split.full
    copies = build.clone(needed, {})
    return [copies.get(node, node) for node in (located.normed, *parameters)]


def heads_first(build: Builder, located: Located, split: Split) -> list[fx.Node]:
    """Copies at full length of query [B, H, S, d] and key [B, Hkv, S, d], before position enters them."""
    needed = ancestors(located.query, located.key, replaced=located.rotated)
    copies = build.clone(needed - split.full, located.rotated)
    return [this_prompt(build, located, copies[node]) for node in (located.query, located.key)]


def this_prompt(build: Builder, located: Located, node: fx.Node) -> fx.Node:
    """Heads first, and without what a filled cache holds in front of the prompt.

    Raises:
        GraphError: it cannot be told that the prompt's own positions are the last ones.
    """
    shape = shape_of(node)
    if same(shape[2], located.length):
        return node
    if same(shape[1], located.length):
        return build.call(torch.transpose, node, 1, 2)
    joins = [
        source.args[0][-1]  # type: ignore[index]
        for source in ancestors(node)
        if is_call(source, "cat") and sizes_equal_to(shape_of(source), shape[2])
    ]
    if not joins or not all(isinstance(last, fx.Node) and located.merged in ancestors(last) for last in joins):
        raise GraphError(
            f"the first attention, {located.attention.name}, has keys of {expr(shape[2])} positions for a prompt of "
            f"{expr(located.length)}, and it cannot be told which of them are the prompt's: start the turn with an "
            "empty cache"
        )
    length = build.size_of(located.merged, 1)
    past = build.size(operator.sub, build.size_of(node, 2), length)
    return build.call(torch.narrow, node, 2, past, length)
