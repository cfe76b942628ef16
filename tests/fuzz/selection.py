"""Which visual tokens a row must keep, worked out by hand from its own tokens alone, in float64.

Nothing here comes from the passes or the kernels, but for the rankings of selectors that are no score: their functions
are their definition, and run here uncompiled on the row by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hawk_compile.settings.config import HawkConfig
from tests import eager_reference
from tests.fuzz.prompts import Group, Line

NOISE = 1e-5
"""Relative: what a float32 score of another order of summation may differ by, some times over."""
TRIES = 8
BY_DETERMINANT, RANK = ("cdpruner", "hawk_diverse"), 0.75
"""Selectors of as many tokens as their embeddings, of D channels, tell apart; the share of D that is surely less."""


@dataclass(frozen=True)
class Compared:
    """What the layer that scores compares: queries [H, S, d] and keys [H, S, d] of one row, and its embeddings."""

    query: Tensor
    key: Tensor
    embeddings: Tensor


def compared(model: Any, merged: Tensor) -> Compared:
    """
    Args:
        merged: [1, S, D].
    """
    with torch.no_grad():
        query, key = eager_reference.first_layer_query_key(model, merged)
    query, key = query[0].double(), key[0].double()
    return Compared(query, key.repeat_interleave(len(query) // len(key), 0), merged[0])


def raw_scores(seen: Compared, group: Group, config: HawkConfig, weights: Tensor) -> Tensor:
    """HAWK's score [V] of the visual tokens of one question.

    Args:
        weights: [H] float64, sum 1.
    """
    question = group.question[-1:] if config.used_query == "last" else group.question
    query, key = seen.query[:, question], seen.key[:, group.visual]
    relevance = query @ key.mT / math.sqrt(query.shape[-1])  # [H, T, V]
    if config.used_query in ("mean", "last"):
        relevance = relevance.mean(1, keepdim=True)
    relevance = relevance[:, -64:]  # of a longer question the last tokens count
    shares = torch.einsum("h,htv->tv", weights, normalised(relevance, config.used_normalization))
    if config.used_query != "content":
        return shares.mean(0)
    spread = relevance.softmax(-1)
    entropy = -(spread * spread.log()).sum(-1)  # [H, T]
    specific = (math.log(len(group.visual)) - weights @ entropy).clamp_min(0)
    return specific @ shares / specific.sum() if specific.sum() > 0 else shares.mean(0)


def normalised(relevance: Tensor, how: str) -> Tensor:
    if how == "softmax":
        return relevance.softmax(-1)
    if how == "l2":
        return relevance / relevance.norm(dim=-1, keepdim=True)
    low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
    return (relevance - low) / (high - low).clamp_min(1e-12)


def scores_of(seen: Compared, line: Line, groups: list[Group], config: HawkConfig, weights: Tensor) -> Tensor:
    """[V] float64, in the order of `line.visual`."""
    if config.normalize_per == "image":
        parts = torch.tensor(line.visual).split(line.units)
        asked = {place: group.question for group in groups for place in group.visual}
        groups = [Group(part.tolist(), asked[int(part[0])]) for part in parts]
    found = {}
    for group in groups:
        if group.visual and group.question:
            found |= dict(zip(group.visual, raw_scores(seen, group, config, weights).tolist(), strict=True))
    return torch.tensor([found.get(place, 0.0) for place in line.visual], dtype=torch.float64)


def bounds(line: Line, config: HawkConfig) -> tuple[int, int, list[int]]:
    """(least, most) visual tokens that a row keeps, and what each image keeps of them."""
    left = 1 - Fraction(repr(config.ratio)).limit_denominator(1000)

    def share(count: int) -> int:
        return max(1, math.ceil(count * left))

    total = len(line.visual)
    floors = [max(share(count) if config.quota == "image" else 0, min(config.min_per_image, count))
              for count in line.units] if config.per_image else []  # fmt: skip
    least = most = 0 if config.quota == "image" else share(total)
    if config.budget is not None:
        asked = config.budget
        most = most if asked.max is None else within(asked.max, total)
        least = min(within(asked.min, total), most)
    least, most = max(least, sum(floors)), max(most, sum(floors))
    while config.bucket > 1 and most < total and (len(line.ids) - total + most) % config.bucket:
        least, most = least + 1, most + 1
    return least, most, floors


def within(bound: float, total: int) -> int:
    """A number of tokens, or a fraction of them."""
    return min(total, max(1, bound if isinstance(bound, int) else math.ceil(bound * total)))


def guaranteed_first(line: Line, order: list[int], floors: list[int]) -> list[int]:
    """Visual tokens, by number, in an order behind the best of each image."""
    image = [number for number, count in enumerate(line.units) for _ in range(count)] if floors else []
    left, first = [*floors], []
    for token in order if floors else ():
        if left[image[token]] > 0:
            left[image[token]] -= 1
            first.append(token)
    return first + [token for token in order if token not in set(first)]


def kept(line: Line, scores: Tensor, ranks: Tensor, config: HawkConfig) -> list[int]:
    """Positions of the kept visual tokens, ascending.

    Args:
        scores, ranks: [V], HAWK's score and what the selector ranks by.
    """
    least, most, floors = bounds(line, config)
    count = most if config.budget is None else fewest(line, scores, config.budget.mass, floors, least, most)

    def key(token: int) -> tuple[float, float, int]:
        return -float(ranks[token]), -float(scores[token]) if floors else 0.0, token

    order = guaranteed_first(line, sorted(range(len(ranks)), key=key), floors)
    return sorted(line.visual[token] for token in order[:count])


def fewest(line: Line, scores: Tensor, mass: float, floors: list[int], least: int, most: int) -> int:
    """How many of the best hold a share of the score, what each image keeps first."""
    positive = scores.clamp_min(0).tolist()
    best = sorted(range(len(positive)), key=lambda token: (-float(scores[token]), token))
    order = guaranteed_first(line, best, floors)
    wanted, held, count = mass * sum(positive) * (1 - 1e-6), 0.0, 0
    while count < len(order) and (held < wanted or count == 0):
        held += positive[order[count]]
        count += 1
    return min(max(count, least), most)


def ranks_of(seen: Compared, line: Line, groups: list[Group], scores: Tensor, config: HawkConfig) -> Tensor:
    """[V]: what the selector ranks by, of the row alone."""
    if config.method.ranking is None:
        return scores
    length = len(line.ids)
    visual, question, spread = torch.zeros(1, length).bool(), torch.zeros(1, length).bool(), torch.zeros(1, length)
    visual[0, line.visual] = True
    question[0, [place for group in groups for place in group.question]] = True
    if config.used_query == "last":
        question[0, : max(place for group in groups for place in group.question)] = False
    spread[0, line.visual] = scores.float()
    has = {
        "scores": spread, "embeddings": seen.embeddings[None], "visual_mask": visual, "question_mask": question,
        "budget": torch.tensor([bounds(line, config)[1]]),
    }  # fmt: skip
    read = {name: value for name, value in has.items() if config.method.reads(name)}
    return config.method.ranking(**read, **config.method.options)[0, line.visual].double()


@dataclass(frozen=True)
class Row:
    """One row as the layer that scores sees it, and who votes on it.

    Attributes:
        weights: [H] float64, of the heads, sum 1.
    """

    seen: Compared
    line: Line
    groups: list[Group]
    config: HawkConfig
    weights: Tensor

    def scores(self) -> Tensor:
        """[V] float64."""
        return scores_of(self.seen, self.line, self.groups, self.config, self.weights)

    def kept(self, scores: Tensor) -> list[int]:
        """Positions of the visual tokens that stay, ascending."""
        return kept(self.line, scores, ranks_of(self.seen, self.line, self.groups, scores, self.config), self.config)

    def may_keep(self, found: list[int], scores: Tensor) -> bool:
        """Whether rounding alone makes the difference: what was chosen otherwise is what noise of its size chooses
        otherwise, too."""
        wanted, movable = {*self.kept(scores)}, set()
        if self.config.method.name in BY_DETERMINANT and len(wanted) > RANK * self.seen.embeddings.shape[1]:
            return True  # what is taken last adds nothing to a determinant, and is taken by noise
        generator = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            noise = torch.randn(len(scores), generator=generator, dtype=torch.float64) * scores.abs().max() * NOISE
            channels = torch.randn(self.seen.embeddings.shape, generator=generator) * NOISE
            moved = replace(self.seen, embeddings=self.seen.embeddings * (1 + channels))
            movable |= {*replace(self, seen=moved).kept(scores + noise)} ^ wanted
        return {*found} ^ wanted <= movable
