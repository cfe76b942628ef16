"""Features have to stand in the places of their tokens as they leave the encoder; over stand-ins for vLLM's models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.errors import UnsupportedModelError
from hawk_compile.serving.vllm.compat.model import Decoder, check_merge

WIDTH = 12
DECODER = Decoder(nn.Module(), nn.Module(), WIDTH, 4, 2, 4, torch.device("cpu"), torch.float32)

Merge = Callable[[Tensor, Tensor], Tensor]
"""(words [1, D], features [1, W]) -> what stands in their place [1, D]."""


def model(merge: Merge) -> Callable[..., Tensor]:
    words = nn.Embedding(4, WIDTH)

    def embed(ids: Tensor, features: list[Tensor], *, is_multimodal: Tensor) -> Tensor:
        rows = words(ids).detach().clone()
        rows[is_multimodal] = merge(rows[is_multimodal], torch.cat(features))
        return rows

    return embed


def split(levels: int) -> Merge:
    """With features of deeper layers behind those of the first."""
    return lambda words, features: features.split([WIDTH, levels * WIDTH], 1)[0]


@pytest.mark.parametrize("merge", [lambda words, features: features, split(1), split(3)])
def test_features_in_the_places_of_their_tokens(merge: Merge) -> None:
    check_merge(model(merge), DECODER)


@pytest.mark.parametrize("merge", [
    lambda words, features: words + features,
    lambda words, features: features * 12,
    lambda words, features: 0 * words,  # features that later layers get alone
    lambda words, features: features.split([WIDTH, WIDTH], 1)[1],
    split(20),
])  # fmt: skip
def test_something_else_is_refused(merge: Merge) -> None:
    with pytest.raises(UnsupportedModelError, match="does not put visual features as they leave the encoder in the"):
        check_merge(model(merge), DECODER)
