"""Modules that an operator runs: which are told apart, which have no shell, and each with its own settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hawk_compile.capture.experts import experts_stood_for, loops_over_choices
from hawk_compile.capture.shells import description
from hawk_compile.errors import GraphError


class Experts(nn.Module):
    """Each token times the weight and the scale of the expert that it has chosen."""

    def __init__(self, scales: Any, **more: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.scales = scales
        self.dtype: Any = None
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            chosen = torch.where(top_k_index == expert)[0]
            result[chosen] += hidden_states[chosen] * self.weight[expert] * self.scales[int(expert)]
        return result.to(self.dtype or result.dtype)


@pytest.fixture(autouse=True)
def stood_for() -> Iterator[None]:
    experts_stood_for.begin(user := nn.Module(), nn.ModuleList([Experts([1.0, 1.0])]))
    yield
    experts_stood_for.end(user)


def test_each_runs_with_its_own_settings() -> None:
    """In one graph that was captured for all tokens, whatever they choose."""
    both = nn.ModuleList([Experts([1.0, 5.0]), Experts([9.0, 7.0])])

    def run(x: Tensor, index: Tensor) -> list[Tensor]:
        return [experts(x, index, torch.ones_like(index)) for experts in both]

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with torch.no_grad():
        for chosen in ([[0], [1], [0]], [[1], [1], [1]]):
            x, index = torch.arange(6.0).view(3, 2), torch.tensor(chosen)
            assert all(map(torch.equal, compiled(x, index), run(x, index)))


@pytest.mark.parametrize("more", [
    {"scale": torch.ones(1)}, {"act": lambda x: x}, {"held": object()}, {"parts": [torch.ones(1)]},
])  # fmt: skip
def test_what_has_no_words_has_no_shell(more: dict[str, Any]) -> None:
    assert loops_over_choices(Experts([1.0, 1.0])) and not loops_over_choices(Experts([1.0, 1.0], **more))


@pytest.mark.parametrize(("one", "other"), [
    ([1.0], (1.0,)), ("1", 1), ({"a": 1}, {"a": 2}), (torch.float32, torch.bfloat16), (torch.relu_, None),
    (LlamaConfig(), LlamaConfig(hidden_size=64)), (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)), (nn.ReLU(), nn.SiLU()),
])  # fmt: skip
def test_settings_tell_modules_apart(one: Any, other: Any) -> None:
    words = [description(Experts([1.0], setting=each)) for each in (one, other)]
    assert words[0] != words[1]


def test_what_a_graph_cannot_know_is_refused() -> None:
    experts = Experts([1.0, 1.0], dtype=torch.float64)
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(GraphError, match=r"experts gave torch.float64 \(1, 2\) for tokens"):
        compiled(torch.ones(1, 2), torch.tensor([[0]]), torch.ones(1, 1))
