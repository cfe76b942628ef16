"""The definition of the selection in plain PyTorch: no shape depends on the data, nothing is read back to the host."""

import torch
from torch import Tensor


def select(
    scores: Tensor,  # [B, S] float
    visual_mask: Tensor,  # [B, S] bool
    token_mask: Tensor,  # [B, S] bool
    budget: Tensor,  # [B] int64
    length: int,
) -> tuple[Tensor, Tensor]:
    """Kept positions [B, length] int64 and which are real [B, length]; see `hawk_compile.kernels.select.op.select`."""
    candidate = visual_mask & token_mask

    # A stable sort of the row, then a running count of the candidates in it: the rank of each among candidates, with
    # ties in favour of the lower position, whatever else stands in the row.
    scores = scores.float()
    order = torch.where(scores.isnan(), 0.0, scores).argsort(dim=1, descending=True, stable=True)  # [B, S]
    sorted_candidate = candidate.gather(1, order)
    best = sorted_candidate & (sorted_candidate.long().cumsum(1) <= budget.unsqueeze(1))
    return compact(torch.zeros_like(candidate).scatter(1, order, best), visual_mask, token_mask, length)


DIVISIONS, PARTS = 8, 32
"""Divisions of the range of a row's scores, and into how many parts each: scores closer together than 2^-40 of the
range count as equal. Halving it 40 times would be a chain of 40 dependent steps, too many for TensorRT's builder."""


def select_by_threshold(
    scores: Tensor,  # [B, S] float
    visual_mask: Tensor,  # [B, S] bool
    token_mask: Tensor,  # [B, S] bool
    budget: Tensor,  # [B] int64
    length: int,
) -> tuple[Tensor, Tensor]:
    """The same selection without a sort, for targets that limit the length of one.

    Repeated division finds two neighbours, low < high: at least `budget` candidates of the row score `low` or more, and
    fewer `high` or more. Those of the second kind are kept; of the ties in between, the lower positions.
    """
    candidate = visual_mask & token_mask
    scores = scores.float()
    scores = torch.where(scores.isnan(), 0.0, scores)
    wanted = budget.unsqueeze(1)  # [B, 1]
    largest = torch.finfo(torch.float32).max
    low = torch.where(candidate, scores, largest).amin(1, keepdim=True)
    high = torch.where(candidate, scores, -largest).amax(1, keepdim=True)
    high = high + torch.maximum(high - low, 1e-6 * high.abs()).clamp_min(1e-6)  # above every score
    fractions = torch.arange(1, PARTS, device=scores.device) / PARTS  # exact
    for _ in range(DIVISIONS):
        between = low + (high - low) * fractions  # [B, PARTS - 1], ascending
        reached = candidate.unsqueeze(1) & (scores.unsqueeze(1) >= between.unsqueeze(2))  # [B, PARTS - 1, S]
        part = (reached.long().sum(2) >= wanted).long().sum(1, keepdim=True)  # [B, 1]: the last edge that enough reach
        edges = torch.cat([low, between, high], dim=1)
        low, high = edges.gather(1, part), edges.gather(1, part + 1)
    above = candidate & (scores >= high)
    tied = candidate & (scores >= low) & ~above
    left = wanted - above.long().sum(1, keepdim=True)
    return compact(above | (tied & (tied.long().cumsum(1) <= left)), visual_mask, token_mask, length)


def compact(best: Tensor, visual_mask: Tensor, token_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The slots of the chosen visual tokens `best` [B, S] and of all other tokens: (keep, valid), both [B, length]."""
    batch, size = best.shape
    wanted = best | (token_mask & ~visual_mask)  # [B, S]

    # What the wanted leave free goes to the row's padding, the lower position first, and what even that leaves free to
    # fill slots ahead of the row.
    padding = ~token_mask
    free = length - wanted.long().sum(1, keepdim=True)  # [B, 1]
    fill = (free - padding.long().sum(1, keepdim=True)).clamp_min(0)
    chosen = wanted | (padding & (padding.long().cumsum(1) <= free))

    # Compaction: the n-th chosen position goes to the n-th slot behind the filling; the others go to one slot more,
    # which is cut off.
    slot = torch.where(chosen, fill + chosen.long().cumsum(1) - 1, length).clamp_max(length)
    position = torch.arange(size, device=best.device).expand(batch, size)
    text = (token_mask & ~visual_mask).long().argmax(1, keepdim=True)  # the first non-visual token, or 0
    keep = text.repeat(1, length + 1).scatter(1, slot, position)[:, :length]
    valid = wanted.new_zeros(batch, length + 1).scatter(1, slot, wanted)[:, :length]
    return keep.contiguous(), valid.contiguous()
