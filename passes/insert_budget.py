"""Insert how many visual tokens every row keeps, and how long rows are then.

    before: merged [B, S, D] | decoder(merged)
    after:  merged [B, S, D], budget [B], and the sizes S' and V' | decoder(merged)

With a `hawk::plan` in the graph these are its arguments; where that gives bounds, a row's budget are the fewest tokens
that hold a share of its score, and the sizes are read from the device. Without a plan every row must hold the same
number of visual tokens, V / B, of which ceil(V / B * (1 - ratio)) are kept, at least one; S' = S - V / B + that is then
an expression of the graph's own sizes, and an assertion in the graph guards it. Numerics are unchanged: nothing reads
these yet.
"""

import operator
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from hawk_compile.kernels.plan.op import VISUAL_OFFSET
from hawk_compile.kernels.select.budgets import guaranteed_first, kept_of_all, longest_row, tokens_for_mass
from hawk_compile.passes.graph import Builder, Size
from hawk_compile.passes.site import Site, site_of


def insert_budget(
    gm: fx.GraphModule, example_inputs: list[Any], *, removed: Fraction = Fraction(0), mass: float | None = None
) -> fx.GraphModule:
    """Insert the budget; `site.budget`, `site.kept_length` and `site.kept_visual` name it and the sizes.

    Args:
        removed: the fraction of visual tokens that is removed, for graphs without a `hawk::plan`.
        mass: the share of the score that is kept, for plans with bounds.
    """
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    if site.budget is not None:
        return gm
    build = Builder(gm, site.boundary)
    if mass is not None:
        insert_mass_budget(build, site, mass)
    elif site.plan is not None:
        site.budget = site.plan.args[1]  # type: ignore[assignment]
        slots: Any = site.plan.args[3:5]
        length, visual = (build.size_of(each, 0) for each in slots)
        site.kept_length, site.kept_visual = length, build.size(operator.sub, visual, VISUAL_OFFSET)
    else:
        site.budget = uniform_budget(build, site, removed)
    return gm


def insert_mass_budget(build: Builder, site: Site, mass: float) -> None:
    assert site.plan is not None
    most, least = site.plan.args[1], site.planned("least")
    candidate = build.call(torch.logical_and, site.visual_mask, site.token_mask)
    ranks, image = None, site.planned("image")
    if image is not None:  # what is guaranteed holds its share too, and is kept first
        ranks = build.call(guaranteed_first, site.scores, site.scores, candidate, image, site.planned("floor"))
    site.budget = build.call(tokens_for_mass, site.scores, candidate, mass, least, most, ranks)
    site.kept_length = build.call(longest_row, candidate, site.token_mask, site.budget)
    site.kept_visual = build.call(kept_of_all, site.budget)


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
