"""Greedy choices of visual tokens, by definition: every step takes one token of every row.

A choice of n tokens is the first n of every longer one, so an order is all there is to compute: [B, S] float32, the
largest budget at the first token taken, falling by one with each step, 0 where nothing was taken.

With cosine similarity c(u, v) of features, importance m(v), and T the tokens taken so far:

    max_min  argmin of max over T of c(v, t); first, the token whose nearest other token is farthest
             (DivPrune, arXiv 2503.02175)
    mmr      argmax of w * m(v) - (1 - w) * max over T of c(v, t); first, argmax of m(v) (IDPruner, arXiv 2602.13315)
    dpp      argmax of det of the kernel m(u) c(u, v) m(v) over T and v (CDPruner, NeurIPS 2025), while it grows: where
             it would fall to `ROUNDING` of itself or less, the rest by m(v)

Importance is scaled to [0, 1] over a row's visual tokens first (`mmr`, `dpp`). Ties go to the lower position.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of similarities that are held at a time where every pair counts: never V x V."""


def greedy_order(
    features: Tensor,  # [B, S, D] float
    importance: Tensor,  # [B, S] float
    visual_mask: Tensor,  # [B, S] bool
    budget: Tensor,  # [B] int64
    rule: str,
    weight: float,
) -> Tensor:
    """[B, S] float32, see above."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)  # [B, S, D]
    scaled = unit_range(importance.float(), visual_mask)
    steps = int(budget.max()) if budget.numel() else 0
    gain = first_gain(rule, unit, scaled, visual_mask)
    return RULES[rule](unit, scaled, visual_mask, steps, weight, gain)


ROUNDING = 1e-6
"""Gains of "dpp", which are in [0, 1], that fp32 cannot tell from none: D features have D at most that are greater."""


def first_gain(rule: str, unit: Tensor, scaled: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: what taking each token first gains; "max_min" alone reads features of length 1; "dpp": the diagonal."""
    if rule == "max_min":
        return -nearest(unit, mask)
    return scaled if rule == "mmr" else scaled.square()


def max_min(unit: Tensor, scaled: Tensor, mask: Tensor, steps: int, weight: float, gain: Tensor) -> Tensor:
    return take(unit, mask, steps, gain, by_closest(lambda closest: -closest))


def mmr(unit: Tensor, scaled: Tensor, mask: Tensor, steps: int, weight: float, gain: Tensor) -> Tensor:
    return take(unit, mask, steps, gain, by_closest(lambda closest: weight * scaled - (1 - weight) * closest))


def dpp(unit: Tensor, scaled: Tensor, mask: Tensor, steps: int, weight: float, gain: Tensor) -> Tensor:
    """Greedy maximum of the determinant by a growing Cholesky factor (Chen, Zhang and Zhou, 2018)."""
    rows, length = mask.shape
    factor = torch.zeros((rows, steps, length), device=mask.device)

    def update(step: int, best: Tensor, similar: Tensor, gain: Tensor) -> Tensor:
        kernel = scaled * similar * scaled.gather(1, best)
        before = factor[:, :step]  # [B, step, S]
        own = before.gather(2, best.unsqueeze(1).expand(-1, step, -1))  # [B, step, 1]
        scale = gain.gather(1, best).sqrt()
        factor[:, step] = (kernel - (own * before).sum(1)) / scale
        return gain - factor[:, step].square()

    order = take(unit, mask, steps, gain, update, least=ROUNDING)
    return rest_by_importance(order, scaled, mask, steps)


def rest_by_importance(order: Tensor, scaled: Tensor, mask: Tensor, steps: int | Tensor) -> Tensor:
    """The order, with what it lacks of `steps` tokens behind it: those of the largest importance [B, S]."""
    left = mask & (order == 0)
    by_importance = scaled.masked_fill(~left, -1.0).argsort(dim=1, descending=True, stable=True)
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    rank = torch.empty_like(by_importance).scatter_(1, by_importance, position)
    lacking = steps - (order > 0).sum(1, keepdim=True)
    return torch.where(left, (lacking - rank).clamp_min(0).to(order.dtype), order)


Update = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(step, token taken [B, 1], similarity to it [B, S], gain before [B, S]) -> gain of taking each token next."""


def take(unit: Tensor, mask: Tensor, steps: int, gain: Tensor, update: Update, least: float = -torch.inf) -> Tensor:
    """[B, S]: the order in which tokens of the largest gain [B, S] are taken, while it is above `least`."""
    left, order = mask.clone(), torch.zeros(mask.shape, device=mask.device)
    for step in range(steps):
        best = gain.masked_fill(~left, -torch.inf).argmax(1, keepdim=True)  # [B, 1]
        takes = left.gather(1, best) & (gain.gather(1, best) > least)
        order.scatter_add_(1, best, (steps - step) * takes.float())
        left.scatter_(1, best, False)
        taken = unit.gather(1, best.unsqueeze(2).expand(-1, -1, unit.shape[2]))  # [B, 1, D]
        similar = torch.matmul(unit, taken.transpose(1, 2)).squeeze(2)
        gain = update(step, best, similar, gain)
    return order


def by_closest(gain_of: Callable[[Tensor], Tensor]) -> Update:
    """Gains that depend on the similarity to the closest token taken [B, S]."""
    closest: Tensor | None = None

    def update(step: int, best: Tensor, similar: Tensor, gain: Tensor) -> Tensor:
        nonlocal closest
        closest = similar if closest is None else torch.maximum(closest, similar)
        return gain_of(closest)

    return update


RULES = {"max_min": max_min, "mmr": mmr, "dpp": dpp}


def nearest(unit: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: the largest similarity to another visual token, -inf where there is none."""
    length = mask.shape[1]
    position = torch.arange(length, device=mask.device)
    found = []
    for start in range(0, length, BLOCK):
        similar = torch.matmul(unit[:, start : start + BLOCK], unit.transpose(1, 2))  # [B, block, S]
        itself = position[start : start + BLOCK, None] == position
        found.append(similar.masked_fill(itself | ~mask.unsqueeze(1), -torch.inf).amax(2))
    return torch.cat(found, 1)


def unit_range(values: Tensor, mask: Tensor) -> Tensor:
    """Values scaled to [0, 1] over the masked ones of each row; 1 where they are all equal."""
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low), torch.ones_like(values)).masked_fill(~mask, 0)
