"""Scores of every voter by itself, held to the formula voter by voter and head by head in float64."""

import pytest
import torch
from torch import Tensor

from hawk_compile.kernels.score.by_token import MOST_TOKENS, last_of_question, last_token, score_each


def by_hand(
    query: Tensor, key: Tensor, visual: Tensor, question_mask: Tensor, weights: Tensor, normalization: str,
    specific: bool,
) -> Tensor:  # fmt: skip
    """One row: query [H, T, d], key [Hkv, S, d], visual [S], question_mask [T] -> [S] float64."""
    heads, tokens, width = query.shape
    group = heads // key.shape[0]
    weights = weights.double()
    scores, shares = [], []
    for t in range(tokens):
        if not question_mask[t]:
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
    """Heads that share keys, rows with other visual tokens and questions, values that stand for nothing."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator) * 2
    key = torch.randn(2, 3, 23, 8, generator=generator)
    visual = torch.rand(2, 23, generator=generator) < 0.6
    question_mask = torch.tensor([[False, True, True, False, True], [True] * 5])
    key[0, :, ~visual[0]] = torch.nan
    query[0, :, 0] = torch.inf
    weights = torch.rand(6, generator=generator)
    weights /= weights.sum()
    found = score_each(query, key, visual, question_mask, weights, normalization, specific)
    for row in range(2):
        expected = by_hand(query[row], key[row], visual[row], question_mask[row], weights, normalization, specific)
        assert (found[row] - expected).abs().max() < 2e-6
        assert not found[row][~visual[row]].any()


@pytest.mark.parametrize("specific", [False, True])
def test_rows_with_nothing_to_weigh(specific: bool) -> None:
    """One visual token (nothing is specific about it), none, and no question: no NaN, and a score where one can be."""
    query, key = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 5, 4)
    visual = torch.zeros(3, 5, dtype=torch.bool)
    visual[0, 2] = True
    visual[2, 1:4] = True
    question_mask = torch.tensor([[True, True], [True, True], [False, False]])
    found = score_each(query, key, visual, question_mask, torch.full((2,), 0.5), "softmax", specific)
    assert found[0].tolist() == [0, 0, 1, 0, 0]
    assert not found[1:].any()


def test_the_last_voters_of_each_row() -> None:
    question_mask = torch.zeros(3, 200, dtype=torch.bool)
    question_mask[0, [3, 7, 199]] = True
    question_mask[1, 20:190] = True
    positions, real = last_of_question(question_mask)
    assert positions.shape == real.shape == (3, MOST_TOKENS)
    assert positions[0][real[0]].tolist() == [3, 7, 199]
    assert positions[1][real[1]].tolist() == list(range(190 - MOST_TOKENS, 190))
    assert not real[2].any() and not positions[2].any()
    last = last_token(question_mask)
    assert [row.nonzero().flatten().tolist() for row in last] == [[199], [189], []]
