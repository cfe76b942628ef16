"""Ids that are known from a prompt of embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawk_compile.capture import modalities
from hawk_compile.capture.modalities import known_ids


class Embedded(nn.Module):
    def __init__(self, rows: int, channels: int, dtype: torch.dtype):
        super().__init__()
        self.embed = nn.Embedding(rows, channels, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [2**22, 100])
def test_thousands_of_ids_are_known(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the comparison with each says, for rows that differ in one channel too."""
    monkeypatch.setattr(modalities, "AT_ONCE", at_once)
    torch.manual_seed(0)
    model = Embedded(500, 24, dtype)
    with torch.no_grad():
        model.embed.weight[100:200] = model.embed.weight[:100]
        model.embed.weight[100:200, 7] += 1
        ids = torch.randint(500, (3, 70))
        prompt = model.embed(ids)
        prompt[0, :5, 3] += 1  # what is no id's
        wanted = list(range(0, 500, 2))
        expected = ids.masked_fill(ids % 2 == 1, -1)
        expected[0, :5] = -1
        assert known_ids(model, prompt, wanted).equal(expected)


def test_of_equal_embeddings_the_first_wanted_id_counts_and_ids_beyond_the_vocabulary_do_not() -> None:
    model = Embedded(10, 4, torch.float32)
    with torch.no_grad():
        model.embed.weight[[3, 5]] = 0.0
        prompt = torch.stack([model.embed.weight[:6], torch.full((6, 4), -0.0)])
        assert known_ids(model, prompt, [5, 3, 151655, -1]).tolist() == [[-1, -1, -1, 5, -1, 5], [5] * 6]
        assert known_ids(model, prompt, [3, 5]).tolist() == [[-1, -1, -1, 3, -1, 3], [3] * 6]
        assert known_ids(model, prompt, [151655]).eq(-1).all()
