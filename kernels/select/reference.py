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
    batch, size = scores.shape
    candidate = visual_mask & token_mask

    # A stable sort of the row, then a running count of the candidates in it: the rank of each among candidates, with
    # ties in favour of the lower position, whatever else stands in the row.
    scores = scores.float()
    order = torch.where(scores.isnan(), 0.0, scores).argsort(dim=1, descending=True, stable=True)  # [B, S]
    sorted_candidate = candidate.gather(1, order)
    best = sorted_candidate & (sorted_candidate.long().cumsum(1) <= budget.unsqueeze(1))
    wanted = torch.zeros_like(candidate).scatter(1, order, best) | (token_mask & ~visual_mask)  # [B, S], class 2

    # What the wanted leave free goes to the row's padding, the lower position first, and what even that leaves free to
    # fill slots ahead of the row.
    padding = ~token_mask
    free = length - wanted.long().sum(1, keepdim=True)  # [B, 1]
    fill = (free - padding.long().sum(1, keepdim=True)).clamp_min(0)
    chosen = wanted | (padding & (padding.long().cumsum(1) <= free))

    # Compaction: the n-th chosen position goes to the n-th slot behind the filling; the others go to one slot more,
    # which is cut off.
    slot = torch.where(chosen, fill + chosen.long().cumsum(1) - 1, length).clamp_max(length)
    position = torch.arange(size, device=scores.device).expand(batch, size)
    text = (token_mask & ~visual_mask).long().argmax(1, keepdim=True)  # the first non-visual token, or 0
    keep = text.repeat(1, length + 1).scatter(1, slot, position)[:, :length]
    valid = wanted.new_zeros(batch, length + 1).scatter(1, slot, wanted)[:, :length]
    return keep.contiguous(), valid.contiguous()
