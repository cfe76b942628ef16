"""What budgets beyond one number per row need, in plain PyTorch."""

import torch
from torch import Tensor

from hawk_compile.kernels.compat import check


def tokens_for_mass(
    scores: Tensor,  # [B, S] float
    candidate: Tensor,  # [B, S] bool
    mass: float,
    least: Tensor,  # [B] int64
    most: Tensor,  # [B] int64
    ranks: Tensor | None = None,  # [B, S] float
) -> Tensor:
    """[B] int64: the fewest candidates that hold a share `mass` of the row's positive scores, between the bounds.

    They are taken in the order of `ranks`, the highest first; without them in that of the scores.
    """
    positive = torch.where(candidate, scores.float(), 0.0).clamp_min(0.0)
    order = torch.where(candidate, scores.float() if ranks is None else ranks, -torch.inf).argsort(1, descending=True)
    held = positive.gather(1, order).cumsum(1)
    # The last bits of a sum: with mass 1 nothing that holds anything is left out, and nothing else is kept.
    short = held < mass * held[:, -1:] * (1 - 1e-6)
    return torch.minimum(torch.maximum(short.long().sum(1) + 1, least), most)


def longest_row(candidate: Tensor, token_mask: Tensor, budget: Tensor) -> int:
    """S': the most positions that a row keeps, read from the device: candidates [B, S] bool, token_mask likewise."""
    others = token_mask.long().sum(1) - candidate.long().sum(1)
    length = (others + budget).amax().item()
    check(length >= 1)
    check(length <= candidate.shape[1])
    return length  # type: ignore[return-value]  # a SymInt while it is traced


def kept_of_all(budget: Tensor) -> int:
    """V': the visual tokens kept over all rows, read from the device; 1 where there are none, which can be indexed."""
    count = budget.sum().clamp_min(1).item()
    check(count >= 1)
    return count  # type: ignore[return-value]


def guaranteed_first(
    ranks: Tensor,  # [B, S] float
    scores: Tensor,  # [B, S] float
    candidate: Tensor,  # [B, S] bool
    image: Tensor,  # [B, S] int64
    floor: Tensor,  # [B, S] int64
) -> Tensor:
    """[B, S] float32: the order of the ranks, behind the `floor` best candidates of every image.

    Equal ranks, as of all that a greedy order did not take, go by score, and then to the lower position.
    """
    rows, length = scores.shape
    place = torch.arange(length, device=scores.device).expand(rows, length)
    order = descending(scores, candidate)
    order = order.gather(1, descending(ranks.gather(1, order), candidate.gather(1, order)))  # [B, S], the best first
    # A second, stable sort brings each image's tokens together, the best first.
    outside = torch.where(candidate, image, torch.iinfo(torch.int64).max).gather(1, order)
    order_by_image = order.gather(1, outside.argsort(dim=1, stable=True))
    sorted_image = image.gather(1, order_by_image)
    begins = torch.ones_like(candidate)
    begins[:, 1:] = sorted_image[:, 1:] != sorted_image[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    among_image = torch.zeros_like(place).scatter(1, order_by_image, place - start)
    among_all = torch.zeros_like(place).scatter(1, order, place)
    guaranteed = candidate & (among_image < floor)
    return (length - among_all + torch.where(guaranteed, length, 0)).float()


def descending(values: Tensor, candidate: Tensor) -> Tensor:
    """[B, S] int64: the order of the candidates, the highest first, all others behind them; it is stable."""
    known = torch.where(values.isnan(), 0.0, values.float())
    return torch.where(candidate, known, -torch.inf).argsort(dim=1, descending=True, stable=True)
