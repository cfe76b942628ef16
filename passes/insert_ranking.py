"""Let a selector rank the visual tokens, where they are not chosen by their scores.

    before: merged [B, S, D], scores [B, S], budget [B] | decoder(merged)
    after:  merged [B, S, D], budget [B]
            scores [B, S] = ranking(embeddings=merged, visual_mask=..., budget=...) | decoder(merged)

A ranking is a function whose parameters name what it reads, the score among it. What was scored for nothing is taken
out again. The rest of the graph is unchanged.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import Builder, same, shape_of, value
from hawk_compile.passes.site import Budgeted, Located, Ranked, Scored, Split, find, note, read

READABLE: dict[str, Callable[[Builder, Located, Scored, Budgeted], Any]] = {
    "scores": lambda build, located, scored, budgeted: scored.scores,
    "embeddings": lambda build, located, scored, budgeted: located.merged,
    "visual_mask": lambda build, located, scored, budgeted: candidates(build, scored),
    "question_mask": lambda build, located, scored, budgeted: build.call(torch.ne, scored.question_mask, 0),
    "budget": lambda build, located, scored, budgeted: budgeted.budget,
}
"""What a ranking may read, by name."""
FORMER_NAMES = {"votes": "question_mask"}
"""Names of the last release, which rankings of users may still have."""


def insert_ranking(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    ranking: Callable[..., Tensor] | None = None,
    ranking_options: tuple[tuple[str, Any], ...] = (),
) -> fx.GraphModule:
    """Put what the ranking makes in the place of the scores, and note by what visual tokens are then ranked.

    Args:
        ranking: a function of tensors [B, S] and [B, S, D], see above; None leaves the scores.
        ranking_options: values of its other parameters, by name.

    Raises:
        GraphError: it asks for something else, fails, or does not return one value per position.
    """
    if find(gm, Ranked) is not None:
        return gm
    located, split, scored, budgeted = read(gm, Located), read(gm, Split), read(gm, Scored), read(gm, Budgeted)
    scores = scored.scores
    if ranking is None:
        note(gm, Ranked(scores, scores))
        return gm
    build = Builder(gm, split.boundary)
    options = dict(ranking_options)
    wanted = what_it_reads(ranking, options)
    try:
        read_by_it = {name: READABLE[what](build, located, scored, budgeted) for name, what in wanted.items()}
        ranks = build.call(ranking, **read_by_it, **options)
    except Exception as error:
        raise GraphError(
            f"selector {ranking.__name__} cannot be traced with symbolic sizes ({type(error).__name__}: {error}): "
            "write it with operators of torch, and take sizes from its arguments' shapes"
        ) from error
    found = value(ranks)
    alike = isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2
    if not alike or not all(map(same, found.shape, shape_of(scores))):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GraphError(
            f"selector {ranking.__name__} must return a float tensor {shape_of(scores)} like `scores`, got {shape}: "
            "let it return a number for each token"
        )
    ranked = build.call(torch.ops.aten.to.dtype, ranks, torch.float32)
    if located.planned("image") is not None:
        note(gm, Ranked(ranked, scores))
    else:
        note(gm, Ranked(ranked, ranked))
        erase_unread(gm.graph, scores, {scored.visual_mask, scored.token_mask, scored.question_mask, *split.full})
    return gm


def what_it_reads(ranking: Callable[..., Any], options: Collection[str]) -> dict[str, str]:
    """Parameter of a ranking -> which of `READABLE` it is given, of those that are no options.

    Raises:
        GraphError: it reads what there is not.
    """
    wanted = [name for name in inspect.signature(ranking).parameters if name not in options]
    if unknown := [name for name in wanted if FORMER_NAMES.get(name, name) not in READABLE]:
        raise GraphError(f"selector {ranking.__name__} reads {', '.join(unknown)}; there are {', '.join(READABLE)}")
    return {name: FORMER_NAMES.get(name, name) for name in wanted}


def candidates(build: Builder, scored: Scored) -> fx.Node:
    """[B, S] bool: the visual tokens that are no padding."""
    return build.call(torch.logical_and, scored.visual_mask, scored.token_mask)


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
