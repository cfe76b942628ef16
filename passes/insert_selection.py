"""Insert the selection of the positions that every row keeps.

    before: scores [B, S], budget [B] | decoder(merged)
    after:  scores [B, S], budget [B]
            keep [B, S'], valid [B, S'] = hawk.select(scores, visual mask, real tokens, budget, S')
            | decoder(merged)

What a selector ranked is chosen by the ranks instead of the scores. The results of a `hawk::plan` in the graph become
those of the selection.
"""

from typing import Any

import torch
from torch import fx

import hawk_compile.kernels.select.op  # noqa: F401  registers the operator
from hawk_compile.passes.graph import Builder
from hawk_compile.passes.site import (
    Budgeted,
    Located,
    Ordered,
    Ranked,
    Scored,
    Selected,
    Split,
    find,
    note,
    read,
)


def insert_selection(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Insert the selection, and note its results."""
    if find(gm, Selected) is not None:
        return gm
    scored, budgeted = read(gm, Scored), read(gm, Budgeted)
    build = Builder(gm, read(gm, Split).boundary)
    masks = (scored.visual_mask, scored.token_mask)
    select = torch.ops.hawk.select.default
    chosen = build.call(select, read(gm, Ordered).ranks, *masks, budgeted.budget, budgeted.kept_length)
    selected = Selected(keep=build.item(chosen, 0), valid=build.item(chosen, 1))
    note(gm, selected)
    plan = read(gm, Located).plan
    if plan is not None:
        answer_plan(gm.graph, plan, (selected.keep, selected.valid, read(gm, Ranked).scores))
    return gm


def answer_plan(graph: fx.Graph, plan: fx.Node, answers: tuple[fx.Node, ...]) -> None:
    """Give the plan's results (keep, valid, scores) the values that were computed, and drop the marker."""
    for taken in list(plan.users):
        taken.replace_all_uses_with(answers[taken.args[1]])  # type: ignore[index]
        graph.erase_node(taken)
    graph.erase_node(plan)
