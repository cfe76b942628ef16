"""How answers are compared where rounding chooses among tokens of one score."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.serving.engine import Answer, farthest, is_tied

PICTURES = torch.tensor([3, 4, 5, 9, 10, 11])
"""The places of two pictures' tokens."""


@pytest.mark.parametrize(("scores", "kept", "tied"), [
    ([0.1, 0.9, 0.5, 0.2, 0.3, 0.1], [1, 4], False),
    ([0.1, 0.9, 0.5, 0.3, 0.3, 0.1], [1, 4], True),  # the first or the second of the second picture
    ([0.1, 0.9, 0.3, 0.3, 0.2, 0.1], [1, 3], False),  # one score, in two pictures
    ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3], [0, 1, 2, 3, 4, 5], False),  # all of it stays
])  # fmt: skip
def test_a_tie_is_one_at_the_edge_of_what_is_kept_of_a_picture(
    scores: list[float], kept: list[int], tied: bool
) -> None:
    assert is_tied(torch.tensor(scores), kept, PICTURES) is tied


def test_answers_that_are_tied_have_the_same_length_alone() -> None:
    clear, tied = Answer([1, 2], [-0.5, -0.25], 9), Answer([1, 2], [-0.5, -0.5], 7, tied=True)
    other = [replace(clear, logprobs=[-0.5, -0.75]), Answer([4, 5], [-1, -1], 7)]
    assert farthest([clear, tied], other) == 0.5
    assert farthest([clear, tied], [other[0], replace(other[1], prompt=8)]) == math.inf
    assert farthest([tied], other[1:]) == math.inf, "where nothing else is compared, they are"
