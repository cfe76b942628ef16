"""Let a selector rank the visual tokens, where they are not chosen by their scores.

    before: merged [B, S, D], scores [B, S], budget [B] | decoder(merged)
    after:  merged [B, S, D], budget [B]
            scores [B, S] = ranking(embeddings=merged, visual_mask=..., budget=...) | decoder(merged)

A ranking is a function whose parameters name what it reads, the score among it. What was scored for nothing is taken
out again. The rest of the graph is unchanged.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import Builder, same, shape_of, value
from hawk_compile.passes.site import Site, site_of

READABLE: dict[str, Callable[[Builder, Site], Any]] = {
    "scores": lambda build, site: site.scores,
    "embeddings": lambda build, site: site.merged,
    "visual_mask": lambda build, site: build.call(torch.logical_and, site.visual_mask, site.token_mask),
    "votes": lambda build, site: build.call(torch.ne, site.votes, 0),
    "budget": lambda build, site: site.budget,
}
"""What a ranking may read, by name."""


def insert_ranking(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    ranking: Callable[..., Tensor] | None = None,
    ranking_options: tuple[tuple[str, Any], ...] = (),
) -> fx.GraphModule:
    """Replace `site.scores` by what the ranking makes.

    Args:
        ranking: a function of tensors [B, S] and [B, S, D], see above; None leaves the scores.
        ranking_options: values of its other parameters, by name.

    Raises:
        GraphError: it asks for something else, fails, or does not return one value per position.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if ranking is None or site.ranked:
        return gm
    build = Builder(gm, site.boundary)
    options = dict(ranking_options)
    wanted = [name for name in inspect.signature(ranking).parameters if name not in options]
    if unknown := [name for name in wanted if name not in READABLE]:
        raise GraphError(f"selector {ranking.__name__} reads {', '.join(unknown)}; there are {', '.join(READABLE)}")
    scores = site.scores
    assert scores is not None
    try:
        ranks = build.call(ranking, **{name: READABLE[name](build, site) for name in wanted}, **options)
    except Exception as error:
        raise GraphError(f"selector {ranking.__name__} cannot be traced with symbolic sizes: {error}") from error
    found = value(ranks)
    alike = isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2
    if not alike or not all(map(same, found.shape, shape_of(scores))):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GraphError(
            f"selector {ranking.__name__} must return a float tensor {shape_of(scores)} like `scores`, got {shape}"
        )
    site.scores, site.ranked = build.call(torch.ops.aten.to.dtype, ranks, torch.float32), True
    if site.planned("image") is not None:
        site.hawk_scores = scores
    else:
        erase_unread(gm.graph, scores, {site.visual_mask, site.token_mask, site.votes, *site.full})
    return gm


def erase_unread(graph: fx.Graph, node: fx.Node, needed: set[Any]) -> None:
    """Erase a node that nothing reads, and what only it read, but for what is needed later."""
    stack = [node]
    while stack:
        each = stack.pop()
        if not each.users and each not in needed and each.op in ("call_function", "call_method"):
            before = each.all_input_nodes
            graph.erase_node(each)
            needed = needed | {each}
            stack.extend(before)
