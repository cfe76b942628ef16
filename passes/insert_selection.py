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
from hawk_compile.passes.site import Site, site_of


def insert_selection(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Insert the selection; `site.keep` and `site.valid` name its results."""
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if site.keep is not None:
        return gm
    build = Builder(gm, site.boundary)
    ranks = site.ranks or site.scores
    select = torch.ops.hawk.select.default
    chosen = build.call(select, ranks, site.visual_mask, site.token_mask, site.budget, site.kept_length)
    site.keep, site.valid = build.item(chosen, 0), build.item(chosen, 1)
    if site.plan is not None:
        answer_plan(gm.graph, site)
    return gm


def answer_plan(graph: fx.Graph, site: Site) -> None:
    """Give the plan's results (keep, valid, scores) the values that were computed, and drop the marker."""
    assert site.plan is not None
    answers = (site.keep, site.valid, site.scores)
    for taken in list(site.plan.users):
        answer = answers[taken.args[1]]  # type: ignore[index]
        assert answer is not None
        taken.replace_all_uses_with(answer)
        graph.erase_node(taken)
        site.full.discard(taken)
    graph.erase_node(site.plan)
    site.full.discard(site.plan)
    site.plan = None
