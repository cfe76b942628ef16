"""Insert the selection of the positions that every row keeps.

    before: scores [B, S] | decoder(merged)
    after:  scores [B, S]
            keep [B, S'], valid [B, S'] = hawk.select(scores, visual mask, real tokens, budget [B], S')
            | decoder(merged)

With a `hawk::plan` in the graph, budget and S' are its arguments and its results become those of the selection. Without
one every row must hold the same number of visual tokens, V / B, of which ceil(V / B * (1 - ratio)) are kept, at least
one; S' = S - V / B + that is then an expression of the graph's own sizes, and an assertion in the graph guards it.
"""

import operator
from fractions import Fraction
from typing import Any

import torch
from torch import fx

import hawk_compile.kernels.select.op  # noqa: F401  registers the operator
from hawk_compile.kernels.plan.op import SLOT_OFFSET
from hawk_compile.passes.graph import Builder, Size
from hawk_compile.passes.site import Site, site_of


def insert_selection(
    gm: fx.GraphModule, example_inputs: list[Any], *, removed: Fraction = Fraction(0)
) -> fx.GraphModule:
    """Insert the selection; `site.keep` and `site.valid` name its results.

    Args:
        removed: the fraction of visual tokens that is removed, for graphs without a `hawk::plan`.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if site.keep is not None:
        return gm
    build = Builder(gm, site.boundary)
    if site.plan is not None:
        budget = site.plan.args[1]
        site.kept_length = planned_size(build, site.plan.args[3])
        site.kept_visual = planned_size(build, site.plan.args[4])
    else:
        budget = uniform_budget(build, site, removed)
    select = torch.ops.hawk.select.default
    chosen = build.call(select, site.scores, site.visual_mask, site.token_mask, budget, site.kept_length)
    site.keep, site.valid = build.item(chosen, 0), build.item(chosen, 1)
    if site.plan is not None:
        answer_plan(gm.graph, site)
    return gm


def planned_size(build: Builder, slots: Any) -> Size:
    return build.size(operator.sub, build.size_of(slots, 0), SLOT_OFFSET)


def uniform_budget(build: Builder, site: Site, removed: Fraction) -> fx.Node:
    """[B] budget of rows that all hold V / B visual tokens; sets `site.kept_length` and `site.kept_visual`."""
    rows, length = (build.size_of(site.merged, dim) for dim in (0, 1))
    visual: Size = 0
    for merge in site.merges:
        flat = build.call(torch.flatten, merge.args[2], 0, -2)
        visual = build.size(operator.add, build.size_of(flat, 0), visual)
    per_row = build.size(operator.floordiv, visual, rows)
    counts = build.call(torch.sum, site.visual_mask, 1)
    equal = build.call(torch.all, build.call(torch.eq, counts, per_row))
    build.call(
        torch._assert_async,
        equal,
        "the rows of this batch hold different numbers of visual tokens; use hawk_compile.optimize, which plans a "
        "budget for each row, or batch rows with equal numbers",
    )
    kept = kept_of(build, per_row, 1 - removed)
    site.kept_visual = build.size(operator.mul, kept, rows)
    site.kept_length = build.size(operator.add, build.size(operator.sub, length, per_row), kept)
    return build.call(torch.mul, build.call(torch.ones_like, counts), kept)


def kept_of(build: Builder, count: Size, fraction: Fraction) -> Size:
    """max(1, ceil(count * fraction)) in integers."""
    scaled = build.size(operator.mul, count, fraction.numerator)
    raised = build.size(operator.add, scaled, fraction.denominator - 1)
    kept = build.size(operator.floordiv, raised, fraction.denominator)
    return build.size(torch.sym_max, kept, 1)


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
