"""Scores of every voter by itself, held to the formula voter by voter and head by head in float64."""

import pytest
import torch
from torch import Tensor

from hawk_compile.kernels.score.voters import VOTERS, last_vote, last_voters, score_each


def by_hand(
    query: Tensor, key: Tensor, visual: Tensor, votes: Tensor, weights: Tensor, normalization: str, specific: bool
) -> Tensor:
    """One row: query [H, T, d], key [Hkv, S, d], visual [S], votes [T] -> [S] float64."""
    heads, voters, width = query.shape
    group = heads // key.shape[0]
    weights = weights.double()
    scores, shares = [], []
    for t in range(voters):
        if not votes[t]:
            continue
        score, share = torch.zeros(int(visual.sum()), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        for h in range(heads):
            raw = key[h // group][visual].double() @ query[h, t].double() / width**0.5
            attention = raw.softmax(0)
            score += weights[h] * (attention if normalization == "softmax" else raw / raw.norm())
            entropy = -(attention * attention.log()).sum()
            share += weights[h] * (torch.log(torch.tensor(float(len(raw)))) - entropy)
        scores.append(score)
        shares.append(share if specific else torch.ones_like(share))
    share = torch.stack(shares)
    found = torch.zeros(len(visual), dtype=torch.float64)
    found[visual] = (share / share.sum()) @ torch.stack(scores)
    return found


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("normalization", ["softmax", "l2"])
def test_scores(normalization: str, specific: bool) -> None:
    """Heads that share keys, rows with other visual tokens and voters, values that stand for nothing."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator) * 2
    key = torch.randn(2, 3, 23, 8, generator=generator)
    visual = torch.rand(2, 23, generator=generator) < 0.6
    votes = torch.tensor([[False, True, True, False, True], [True] * 5])
    key[0, :, ~visual[0]] = torch.nan
    query[0, :, 0] = torch.inf
    weights = torch.rand(6, generator=generator)
    weights /= weights.sum()
    found = score_each(query, key, visual, votes, weights, normalization, specific)
    for row in range(2):
        expected = by_hand(query[row], key[row], visual[row], votes[row], weights, normalization, specific)
        assert (found[row] - expected).abs().max() < 2e-6
        assert not found[row][~visual[row]].any()


@pytest.mark.parametrize("specific", [False, True])
def test_rows_with_nothing_to_weigh(specific: bool) -> None:
    """One visual token (no voter is specific about it), none, and no voters: no NaN, and a score where there can be."""
    query, key = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 5, 4)
    visual = torch.zeros(3, 5, dtype=torch.bool)
    visual[0, 2] = True
    visual[2, 1:4] = True
    votes = torch.tensor([[True, True], [True, True], [False, False]])
    found = score_each(query, key, visual, votes, torch.full((2,), 0.5), "softmax", specific)
    assert found[0].tolist() == [0, 0, 1, 0, 0]
    assert not found[1:].any()


def test_the_last_voters_of_each_row() -> None:
    votes = torch.zeros(3, 200, dtype=torch.bool)
    votes[0, [3, 7, 199]] = True
    votes[1, 20:190] = True
    positions, real = last_voters(votes)
    assert positions.shape == real.shape == (3, VOTERS)
    assert positions[0][real[0]].tolist() == [3, 7, 199]
    assert positions[1][real[1]].tolist() == list(range(190 - VOTERS, 190))
    assert not real[2].any() and not positions[2].any()
    last = last_vote(votes)
    assert [row.nonzero().flatten().tolist() for row in last] == [[199], [189], []]
