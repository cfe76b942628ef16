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
from hawk_compile.passes.compat import assert_async
from hawk_compile.passes.graph import Builder, Size
from hawk_compile.passes.site import Budgeted, Located, Scored, Split, find, note, read


def insert_budget(
    gm: fx.GraphModule, example_inputs: list[Any], *, removed: Fraction = Fraction(0), mass: float | None = None
) -> fx.GraphModule:
    """Insert the budget and the sizes that follow from it, and note them.

    Args:
        removed: the fraction of visual tokens that is removed, for graphs without a `hawk::plan`.
        mass: the share of the score that is kept, for plans with bounds.
    """
    if find(gm, Budgeted) is not None:
        return gm
    located, scored = read(gm, Located), read(gm, Scored)
    build = Builder(gm, read(gm, Split).boundary)
    if mass is not None:
        note(gm, mass_budget(build, located, scored, mass))
    elif located.plan is not None:
        note(gm, planned_budget(build, located.plan))
    else:
        note(gm, uniform_budget(build, located, scored, removed))
    return gm


def planned_budget(build: Builder, plan: fx.Node) -> Budgeted:
    budget, _, *slots = plan.args[1:5]
    length, visual = (build.size_of(slot, 0) for slot in slots)  # type: ignore[arg-type]
    return Budgeted(budget, length, build.size(operator.sub, visual, VISUAL_OFFSET))  # type: ignore[arg-type]


def mass_budget(build: Builder, located: Located, scored: Scored, mass: float) -> Budgeted:
    """The fewest tokens that hold a share of a row's score, within the plan's bounds."""
    assert located.plan is not None
    most, least = located.plan.args[1], located.planned("least")
    candidate = build.call(torch.logical_and, scored.visual_mask, scored.token_mask)
    ranks, image = None, located.planned("image")
    if image is not None:  # what is guaranteed holds its share too, and is kept first
        floor = located.planned("floor")
        ranks = build.call(guaranteed_first, scored.scores, scored.scores, candidate, image, floor)
    budget = build.call(tokens_for_mass, scored.scores, candidate, mass, least, most, ranks)
    length = build.call(longest_row, candidate, scored.token_mask, budget)
    return Budgeted(budget, length, build.call(kept_of_all, budget))


def uniform_budget(build: Builder, located: Located, scored: Scored, removed: Fraction) -> Budgeted:
    """The budget of rows that all hold V / B visual tokens."""
    rows, length = (build.size_of(located.merged, dim) for dim in (0, 1))
    visual: Size = 0
    for merge in located.merges:
        flat = build.call(torch.flatten, merge.args[2], 0, -2)
        visual = build.size(operator.add, build.size_of(flat, 0), visual)
    per_row = build.size(operator.floordiv, visual, rows)
    counts = build.call(torch.sum, scored.visual_mask, 1)
    equal = build.call(torch.all, build.call(torch.eq, counts, per_row))
    build.call(
        assert_async,
        equal,
        "the rows of this batch hold different numbers of visual tokens; use hawk_compile.optimize, which plans a "
        "budget for each row, or batch rows with equal numbers",
    )
    kept = kept_of(build, per_row, 1 - removed)
    kept_visual = build.size(operator.mul, kept, rows)
    kept_length = build.size(operator.add, build.size(operator.sub, length, per_row), kept)
    return Budgeted(build.call(torch.mul, build.call(torch.ones_like, counts), kept), kept_length, kept_visual)


def kept_of(build: Builder, count: Size, fraction: Fraction) -> Size:
    """max(1, ceil(count * fraction)) in integers."""
    scaled = build.size(operator.mul, count, fraction.numerator)
    raised = build.size(operator.add, scaled, fraction.denominator - 1)
    kept = build.size(operator.floordiv, raised, fraction.denominator)
    return build.size(torch.sym_max, kept, 1)
