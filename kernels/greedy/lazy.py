"""Greedy choices of visual tokens on a CPU: the steps of `reference.py`, most tokens brought up to date many at once.

What taking a token would gain never grows (`max_min` and `mmr`: from the second step on): the similarity to the closest
token taken only rises, and a residual only loses squares. So a gain that is out of date is a bound of the true one. The
`CANDIDATES` tokens of the largest gain follow every step; the others stay as they were until the best candidate is no
longer above all that they could gain, or for `STEPS` steps, and then make up for these steps in one product of
matrices. So a step reads the features of the candidates, not of every token, and the rest runs at the rate at which
a processor multiplies, not at which it reads:

    candidates, matrix times vector:  k * CANDIDATES * (D + k)        k tokens taken of V
    all, matrix times matrix:         V * k * (D + k)                 no V x V matrix is made

What is taken is what the definition takes, by fp32 sums in another order: of gains that differ by a few roundings the
other may come first.
"""

import torch
from torch import Tensor

from hawk_compile.kernels.greedy import reference

CANDIDATES, STEPS = 256, 64


def greedy_order(
    features: Tensor,  # [B, S, D] float
    importance: Tensor,  # [B, S] float
    visual_mask: Tensor,  # [B, S] bool
    budget: Tensor,  # [B] int64
    rule: str,
    weight: float,
) -> Tensor:
    """[B, S] float32, as `reference.greedy_order`; row by row, text and padding left out."""
    steps = int(budget.max()) if budget.numel() else 0
    order = torch.zeros(visual_mask.shape)
    for row, mask in enumerate(visual_mask):
        places = mask.nonzero().squeeze(1)
        if steps <= 0 or not places.numel():
            continue
        unit = torch.nn.functional.normalize(features[row, places].float(), dim=-1)
        values = importance[row : row + 1, places].float()
        scaled = reference.unit_range(values, torch.ones_like(values, dtype=torch.bool)).squeeze(0)
        taken = take(RULES[rule](unit, scaled, min(steps, places.numel()), weight))
        values = torch.zeros(places.numel())
        values[taken] = torch.arange(steps, steps - len(taken), -1, dtype=torch.float32)
        if rule == "dpp":
            every = torch.ones((1, places.numel()), dtype=torch.bool)
            values = reference.rest_by_importance(values.unsqueeze(0), scaled.unsqueeze(0), every, steps).squeeze(0)
        order[row, places] = values
    return order


class Choice:
    """Gains [V] of taking each token next, -inf where it is taken; not of fewer steps than were caught up with."""

    falls_from = 0
    """Steps after which gains never grow."""
    least = -torch.inf
    """A token is taken while it gains more."""

    def __init__(self, unit: Tensor, gain: Tensor, steps: int) -> None:
        self.unit, self.gain, self.steps = unit, gain, steps

    def part(self, places: Tensor, before: int, most: int) -> "Choice":
        """The same of the tokens at `places` alone, for at most `most` steps more."""
        raise NotImplementedError

    def follow(self, chosen: list[int], before: int) -> None:
        """Bring all gains up to date after tokens were taken, `before` of which had been caught up with."""
        raise NotImplementedError


class Closest(Choice):
    """`base - share * c`, with the similarity c to the closest token taken: "max_min", "mmr"."""

    falls_from = 1  # the first gain is another

    def __init__(self, unit: Tensor, gain: Tensor, steps: int, base: Tensor, share: float, closest: Tensor) -> None:
        super().__init__(unit, gain, steps)
        self.base, self.share, self.closest = base, share, closest

    def part(self, places: Tensor, before: int, most: int) -> "Closest":
        unit, gain, base, closest = (each[places] for each in (self.unit, self.gain, self.base, self.closest))
        return Closest(unit, gain, self.steps, base, self.share, closest)

    def follow(self, chosen: list[int], before: int) -> None:
        for similar in torch.matmul(self.unit[chosen], self.unit.t()):
            self.closest = torch.maximum(self.closest, similar)
        taken = self.gain == -torch.inf
        self.gain = (self.base - self.share * self.closest).masked_fill(taken, -torch.inf)
        self.gain[chosen] = -torch.inf


class Determinant(Choice):
    """The residual of the kernel's diagonal, by a growing Cholesky factor [steps, V]: "dpp"."""

    least = reference.ROUNDING

    def __init__(self, unit: Tensor, gain: Tensor, steps: int, scaled: Tensor, factor: Tensor) -> None:
        super().__init__(unit, gain, steps)
        self.scaled, self.factor = scaled, factor

    def part(self, places: Tensor, before: int, most: int) -> "Determinant":
        factor = torch.empty((before + most, places.numel()))
        torch.index_select(self.factor[:before], 1, places, out=factor[:before])
        return Determinant(self.unit[places], self.gain[places], self.steps, self.scaled[places], factor)

    def follow(self, chosen: list[int], before: int) -> None:
        kernel = self.scaled * torch.matmul(self.unit[chosen], self.unit.t()) * self.scaled[chosen, None]
        kernel -= torch.matmul(self.factor[:before, chosen].t(), self.factor[:before])
        for step, (best, line) in enumerate(zip(chosen, kernel, strict=True), start=before):
            own = self.factor[before:step, best]
            scale = self.gain[best].sqrt()
            self.factor[step] = (line - own @ self.factor[before:step]) / scale
            self.gain -= self.factor[step].square()
            self.gain[best] = -torch.inf


def take(choice: Choice) -> list[int]:
    """The tokens of one row in the order in which they are taken."""
    taken: list[int] = []
    while len(taken) < choice.steps:
        most = min(STEPS, choice.steps - len(taken)) if len(taken) >= choice.falls_from else 1
        chosen = by_candidates(choice, len(taken), most)
        if not chosen:
            break
        if len(taken) + len(chosen) < choice.steps:
            choice.follow(chosen, len(taken))
        taken += chosen
    return taken


def by_candidates(choice: Choice, before: int, most: int) -> list[int]:
    """Tokens to take next: as many, `most` at most, as the candidates alone decide; none where none gains enough."""
    size = choice.gain.numel()
    first, count = int(choice.gain.argmax()), min(CANDIDATES, size)
    if not float(choice.gain[first]) > choice.least:
        return []
    leading = choice.gain.topk(min(count + 1, size))
    limit = float(leading.values[count]) if count < size else -torch.inf  # no other token gains more
    if most == 1 or not float(leading.values[0]) > limit:
        return [first]
    places = leading.indices[:count].sort().values  # so that the first of equal gains is at the lowest position
    part = choice.part(places, before, most)
    chosen, best = [first], int((places == first).nonzero())
    while len(chosen) < most:
        part.follow([best], before + len(chosen) - 1)
        best = int(part.gain.argmax())
        if not float(part.gain[best]) > max(limit, choice.least):
            break
        chosen.append(int(places[best]))
    return chosen


def max_min(unit: Tensor, scaled: Tensor, steps: int, weight: float) -> Choice:
    return Closest(unit, -nearest(unit), steps, torch.zeros_like(scaled), 1.0, torch.full_like(scaled, -torch.inf))


def mmr(unit: Tensor, scaled: Tensor, steps: int, weight: float) -> Choice:
    return Closest(unit, scaled, steps, weight * scaled, 1 - weight, torch.full_like(scaled, -torch.inf))


def dpp(unit: Tensor, scaled: Tensor, steps: int, weight: float) -> Choice:
    return Determinant(unit, scaled.square(), steps, scaled, torch.empty((steps, scaled.numel())))


RULES = {"max_min": max_min, "mmr": mmr, "dpp": dpp}


def nearest(unit: Tensor) -> Tensor:
    """[V]: the largest similarity to another token, -inf where there is none; every pair once."""
    size = unit.shape[0]
    highest = torch.full((size,), -torch.inf)
    for start in range(0, size, reference.BLOCK):
        end = min(start + reference.BLOCK, size)
        similar = torch.matmul(unit[start:end], unit[start:].t())  # [block, V - start]
        similar.diagonal().fill_(-torch.inf)
        highest[start:end] = torch.maximum(highest[start:end], similar.amax(1))
        highest[start:] = torch.maximum(highest[start:], similar.amax(0))
    return highest
