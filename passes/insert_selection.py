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
from torch import SymInt, fx

import hawk_compile.kernels.select.op  # noqa: F401  registers the operator
from hawk_compile.kernels.plan.op import SLOT_OFFSET
from hawk_compile.passes.graph import Builder, tensor, value
from hawk_compile.passes.site import Site, site_of

Size = fx.Node | int


def insert_selection(gm: fx.GraphModule, example_inputs: list[Any], *, removed: Fraction = Fraction(0)) -> fx.GraphModule:
    """Insert the selection; `site.keep` and `site.valid` name its results.

    Args:
        removed: the fraction of visual tokens that is removed, for graphs without a `hawk::plan`.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
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
    size = build.call(torch.ops.aten.sym_size.int, slots, 0)
    return arithmetic(build, operator.sub, size, SLOT_OFFSET)


def arithmetic(build: Builder, operation: Any, left: Size, right: Size) -> Size:
    """`operation(left, right)` on sizes: a node where the result is symbolic, a number where it is not."""
    result = operation(*(value(side) if isinstance(side, fx.Node) else side for side in (left, right)))
    return build.call(operation, left, right) if isinstance(result, SymInt) else int(result)


def uniform_budget(build: Builder, site: Site, removed: Fraction) -> fx.Node:
    """[B] budget of rows that all hold V / B visual tokens; sets `site.kept_length` and `site.kept_visual`."""
    rows, length = (size_of(build, site.merged, dim) for dim in (0, 1))
    visual: Size = 0
    for merge in site.merges:
        flat = build.call(torch.flatten, merge.args[2], 0, -2)
        visual = arithmetic(build, operator.add, size_of(build, flat, 0), visual)
    per_row = arithmetic(build, operator.floordiv, visual, rows)
    counts = build.call(torch.sum, site.visual_mask, 1)
    equal = build.call(torch.all, build.call(torch.eq, counts, per_row))
    build.call(
        torch._assert_async,
        equal,
        "the rows of this batch hold different numbers of visual tokens; use hawk_compile.optimize, which plans a budget "
        "for each row, or batch rows with equal numbers",
    )
    kept = kept_of(build, per_row, 1 - removed)
    site.kept_visual = arithmetic(build, operator.mul, kept, rows)
    site.kept_length = arithmetic(build, operator.add, arithmetic(build, operator.sub, length, per_row), kept)
    return build.call(torch.mul, build.call(torch.ones_like, counts), kept)


def size_of(build: Builder, node: fx.Node, dim: int) -> Size:
    found = tensor(node).shape[dim]  # type: ignore[union-attr]
    return build.call(torch.ops.aten.sym_size.int, node, dim) if isinstance(found, SymInt) else int(found)


def kept_of(build: Builder, count: Size, fraction: Fraction) -> Size:
    """max(1, ceil(count * fraction)) in integers."""
    scaled = arithmetic(build, operator.mul, count, fraction.numerator)
    raised = arithmetic(build, operator.add, scaled, fraction.denominator - 1)
    kept = arithmetic(build, operator.floordiv, raised, fraction.denominator)
    return arithmetic(build, torch.sym_max, kept, 1)


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
