"""The visual tokens of one item that are kept: scored, ranked and chosen by the operators of this package."""

from typing import Any

import torch
from torch import Tensor, nn

import hawk_compile.kernels.score.op
import hawk_compile.kernels.select.op  # noqa: F401  both register operators
from hawk_compile.errors import HawkError, UnsupportedModelError
from hawk_compile.kernels.score.by_token import MOST_TOKENS
from hawk_compile.passes.insert_ranking import what_it_reads
from hawk_compile.serving.vllm.compat.model import attentions_of, with_others
from hawk_compile.settings.config import HawkConfig


class Reached(Exception):
    """The first layer's attention, with its queries and keys."""


class Stop(nn.Module):
    """Stands for the attention of a layer."""

    def forward(self, query: Tensor, key: Tensor, *rest: Any, **others: Any) -> None:
        raise Reached(query, key)


class Unrotated(nn.Module):
    """Stands for the rotary embedding of a layer, and lets position out."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return query, key

    forward_native = forward  # some layers ask for it by name


class Projections:
    """Queries and keys of a decoder's first layer, as its attention gets them, but for position.

    The decoder is run as far as that attention, in a twin that shares every module with it but that one and the rotary
    embedding: what stands in front of it (embeddings that are multiplied, norms, adapters of the checkpoint, quantised
    projections) is the decoder's own.

    Args:
        decoder: takes embeddings, and runs the layers.
        layer: its first one.

    Raises:
        UnsupportedModelError: the layer has not one rotary embedding and one attention, over whole heads.
    """

    def __init__(self, decoder: nn.Module, layer: nn.Module, axes: int, heads: int, kv_heads: int):
        self.axes, self.heads, self.kv_heads = axes, heads, kv_heads
        rotary = [module for name, module in layer.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
        attention = attentions_of(layer)
        if len(rotary) != 1 or len(attention) != 1:
            raise UnsupportedModelError(
                f"the first decoder layer, {type(layer).__name__}, has {len(rotary)} rotary embeddings and "
                f"{len(attention)} attentions, and it is scored by what its one attention reads, but for its one "
                "rotary embedding: leave hawk out of hf_overrides"
            )
        # Layers may share one rotary embedding, and no other layer is run.
        first = with_others(layer, {rotary[0]: Unrotated(), attention[0]: Stop()})
        self.decoder = with_others(decoder, {layer: first})

    def __call__(self, hidden: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
        """(query [1, H, N, d], key [1, Hkv, N, d]) of embeddings [N, D]; of this rank's heads."""
        shape = (self.axes, len(hidden)) if self.axes > 1 else (len(hidden),)
        positions = torch.full(shape, position, device=hidden.device)
        try:
            # A copy, since decoders multiply it where it stands.
            self.decoder(input_ids=None, positions=positions, intermediate_tensors=None, inputs_embeds=hidden.clone())
        except Reached as reached:
            query, key = reached.args
        else:
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} ran without its first attention, by which visual tokens are scored: "
                "leave hawk out of hf_overrides"
            )
        size, of_key = query.numel() / len(hidden) / self.heads, key.numel() / len(hidden) / self.kv_heads
        if size != of_key or len(query) != len(hidden):
            raise UnsupportedModelError(
                f"the first decoder layer's attention reads queries {tuple(query.shape)} and keys {tuple(key.shape)} "
                f"of {len(hidden)} tokens, and it is scored by heads of one size for all of them, which latent "
                "attention and ranks that share tokens out have not: leave hawk out of hf_overrides"
            )
        query = query.reshape(len(hidden), self.heads, -1)
        key = key.reshape(len(hidden), self.kv_heads, -1)
        return query.transpose(0, 1).unsqueeze(0), key.transpose(0, 1).unsqueeze(0)

    def check(self, hidden: Tensor) -> None:
        """Refuse a decoder that is not scored rightly by embeddings alone, whatever prompt they stand in.

        Args:
            hidden: [N, D] zeros, to which anything that is added shows.

        Raises:
            UnsupportedModelError: it reads more than embeddings in front of its first attention, or where they stand.
        """
        name = type(self.decoder).__name__
        try:
            here, there = self(hidden), self(hidden, position=1)
        except HawkError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} does not get as far as its first attention with embeddings alone ({type(error).__name__}: "
                f"{error}), where visual tokens are scored: leave hawk out of hf_overrides"
            ) from error
        if not all(torch.allclose(one, other, equal_nan=True) for one, other in zip(here, there, strict=True)):
            raise UnsupportedModelError(
                f"{name} adds positions to embeddings in front of its first attention, and an image is scored before "
                "it has a place in a prompt: leave hawk out of hf_overrides"
            )


def kept(
    config: HawkConfig, projections: Projections, weights: Tensor, words: Tensor, features: Tensor, keep: int,
    add_up: Any,
) -> Tensor:  # fmt: skip
    """Which visual tokens of an item stay, in order.

    Args:
        weights: [H], of this rank's heads.
        words: [T, D], embeddings of the ids that vote; T may be 0 where the selector reads no text.
        features: [V, D], the item as it leaves the encoder.
        keep: how many stay.
        add_up: sums scores over the ranks of a tensor-parallel model.

    Returns:
        [keep] int64.
    """
    count, total = len(words), len(words) + len(features)
    hidden = torch.cat([words, features])
    visual = torch.arange(total, device=hidden.device).unsqueeze(0) >= count
    budget = torch.full((1,), keep, device=hidden.device)
    method = config.method
    scores = torch.zeros_like(visual, dtype=torch.float32)
    if method.ranking is None or method.reads("scores"):
        query, key = projections(hidden)
        scores = add_up(score(config, query, key, weights, visual, count))
    ranks = scores if method.ranking is None else ranked(config, scores, hidden, visual, budget)
    length = count + keep
    chosen, _ = torch.ops.hawk.select(ranks.float(), visual, torch.ones_like(visual), budget, length)
    return chosen[0, count:] - count


def score(config: HawkConfig, query: Tensor, key: Tensor, weights: Tensor, visual: Tensor, count: int) -> Tensor:
    """[1, S] fp32 scores, by the query of the question's `count` tokens, which stand in front."""
    normalization = config.used_normalization
    if config.used_query in ("each", "content"):
        asked = query[:, :, max(0, count - MOST_TOKENS) : count]
        every = torch.ones(1, asked.shape[2], dtype=torch.bool, device=query.device)
        specific = config.used_query == "content"
        return torch.ops.hawk.score_each(asked, key, visual, every, weights, normalization, specific)
    return torch.ops.hawk.score_projected(query, key, visual, ~visual, weights, normalization)


def ranked(config: HawkConfig, scores: Tensor, hidden: Tensor, visual: Tensor, budget: Tensor) -> Tensor:
    """[1, S], by the selector's ranking."""
    ranking = config.method.ranking
    assert ranking is not None
    readable = {
        "scores": scores,
        "embeddings": hidden.unsqueeze(0),
        "visual_mask": visual,
        "question_mask": ~visual,
        "budget": budget,
    }
    options = dict(config.method.options)
    return ranking(**{name: readable[what] for name, what in what_it_reads(ranking, options).items()}, **options)
