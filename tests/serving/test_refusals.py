"""What a checkpoint, a decoder or a prompt is refused for, each by its name."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.serving.settings import serving_config
from hawk_compile.serving.vllm.compat.model import decoder_of
from hawk_compile.serving.vllm.refusals import check_apart, check_modalities, check_text, runs_of
from hawk_compile.serving.vllm.scoring import Projections
from tests.serving.test_model import HEADS, KV_HEADS, WIDTH, Decoder, Kernel, Layer, Rotary


@dataclass(frozen=True)
class Range:
    """As vLLM's PlaceholderRange: runs of embeddings, each with its last place."""

    runs: tuple[tuple[int, int], ...]

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return list(self.runs)


def test_runs_of_all_modalities_in_order() -> None:
    placeholders = {"video": [Range(((20, 22), (24, 26)))], "image": [Range(((1, 4),)), Range(((30, 30),))]}
    assert runs_of(placeholders) == [(1, 4), (20, 22), (24, 26), (30, 30)]


def test_images_that_touch() -> None:
    check_apart([(1, 4), (6, 9)])
    with pytest.raises(InputError, match=r"two images of this prompt touch.*put text between them.*hawk_ratio"):
        check_apart([(1, 4), (5, 9)])


def test_text_that_stands_for_visual_tokens() -> None:
    def decoded(ids: list[int]) -> str:
        return "".join(f"<{number}>" for number in ids)

    ids, runs = [50, 6, 6, 51, 7, 7, 52], [(1, 2), (4, 5)]
    check_text(ids, runs, {6, 7}, decoded)
    with pytest.raises(InputError, match=r"the text of this prompt holds '<6><7>', which stands for visual tokens"):
        check_text([*ids, 7, 6], runs, {6, 7}, decoded)


def test_a_model_of_which_nothing_would_be_pruned() -> None:
    config = serving_config({"modalities": ["video"]})
    check_modalities(config, {"image": None, "video": None})
    with pytest.raises(UnsupportedModelError, match=r"takes image and audio, and modalities=\['video'\] are pruned"):
        check_modalities(config, {"image": None, "audio": 1})


def projections(layer: nn.Module) -> Projections:
    """Of a decoder of one layer."""
    decoder = Decoder()
    decoder.layers = nn.ModuleList([layer])
    return Projections(decoder, layer, 1, HEADS, KV_HEADS)


def without(part: str) -> Layer:
    layer = Layer()
    setattr(layer.attention, part, nn.Identity())
    return layer


def with_two(part: str) -> Layer:
    layer = Layer()
    layer.other = nn.ModuleDict({"rotary_emb": Rotary()} if part == "rotary_emb" else {"attn": Kernel()})
    return layer


@pytest.mark.parametrize(("layer", "message"), [
    (without("attn"), "has 1 rotary embeddings and 0 attentions"),
    (with_two("attn"), "has 1 rotary embeddings and 2 attentions"),
    (with_two("rotary_emb"), "has 2 rotary embeddings and 1 attentions"),
])  # fmt: skip
def test_a_layer_without_one_attention_behind_one_rotary_embedding(layer: Layer, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"Layer, {message}.*leave hawk out"):
        projections(layer)


class Latent(nn.Module):
    """Attention whose keys have other heads than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_emb, self.attn = Rotary(), Kernel()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: None) -> None:
        self.attn(hidden_states, hidden_states[:, :-KV_HEADS], hidden_states)


class Idle(Latent):
    """A layer that asks nothing of its attention."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: None) -> None:
        return None


@pytest.mark.parametrize(("layer", "message"), [
    (Latent(), "by heads of one size for all of them, which latent attention"),
    (Idle(), "Decoder ran without its first attention"),
])  # fmt: skip
def test_attention_that_cannot_be_scored(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        projections(layer)(torch.zeros(2, WIDTH))


def model_with(layers: Any) -> Any:
    return SimpleNamespace(
        get_language_model=lambda: SimpleNamespace(layers=layers), config=SimpleNamespace(get_text_config=lambda: None)
    )


@pytest.mark.parametrize(("layers", "message"), [
    (None, "has no list of decoder layers"), (nn.ModuleList(), "has no list of decoder layers"),
    (nn.ModuleList([nn.Linear(2, 2)]), "the first decoder layer, Linear, has no softmax attention"),
])  # fmt: skip
def test_decoders_without_a_layer_to_score(layers: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_of(model_with(layers))
