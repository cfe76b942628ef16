"""Where the cut stands if layers without keys come before the first attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hawk_compile.capture.dynamo import capture_settings
from hawk_compile.compile.pipeline import PRUNING, PassOptions, run_passes
from hawk_compile.passes.errors import AttentionNotFoundError
from hawk_compile.passes.graph import ancestors, is_call
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.site import Gathered, Located, Split, read
from tests.passes.graphs import HEAD_DIM, HEADS, IMAGE, VOCABULARY, WIDTH, captured, plan_of, planned, prompt


class Convolution(nn.Module):
    """Tokens meet by a causal convolution of width 3; returns its state beside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        masked = (self.norm(hidden) * mask[:, :, None]).transpose(1, 2)
        return hidden + self.conv(F.pad(masked, (2, 0))).transpose(1, 2), masked[..., -3:]


class Sum(nn.Module):
    """Tokens meet without a change of layout."""

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + (hidden * mask[:, :, None]).cumsum(1), hidden[:, -1]


class Perceptron(nn.Module):
    """Each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + F.silu(self.linear(self.norm(hidden))) * 0.5, hidden[:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(hidden)
        heads = [
            linear(normed).view(*hidden.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        ]
        slot = torch.arange(hidden.shape[1])
        seen = (slot[None, :] <= slot[:, None]) & mask[:, None, None, :].bool()
        attended = F.scaled_dot_product_attention(*heads, attn_mask=seen)
        return hidden + attended.transpose(1, 2).reshape(hidden.shape), heads[1]


class Hybrid(nn.Module):
    """Embedding, merge, layers; returns the hidden states and what each layer keeps.

    Args:
        x0: later layers read the embeddings again.
    """

    def __init__(self, *layers: nn.Module, x0: bool = False):
        super().__init__()
        self.embed, self.layers, self.x0 = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(layers), x0

    def forward(self, ids: Tensor, features: Tensor, attention_mask: Tensor, positions: Tensor) -> tuple[Any, ...]:
        merged = self.embed(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features)
        hidden, kept = merged, []
        mask = attention_mask.float()  # of all layers, in front of the cut and behind
        for layer in self.layers:
            if self.x0 and isinstance(layer, Attention):
                hidden = hidden + merged
            hidden, states = layer(hidden, mask)
            kept.append(states)
        return hidden, *kept


def located(model: nn.Module) -> tuple[fx.GraphModule, Located]:
    inputs = prompt()
    gm = locate_prefill(captured(planned(model), inputs, plan_of(inputs, 2)), [])
    return gm, read(gm, Located)


@pytest.mark.parametrize("mixer", [Convolution, Sum])
def test_the_cut_stands_in_front_of_the_layer_that_attends(mixer: type[nn.Module]) -> None:
    gm, found = located(Hybrid(mixer(), mixer(), Attention(), mixer(), Attention()))
    attention = next(node for node in gm.graph.nodes if is_call(node, "scaled_dot_product_attention"))
    assert found.entry is not found.merged and found.layer == 2 and found.attention is attention
    assert is_call(found.entry, "add")  # the residual stream, not the norm behind it
    mixed = [node for node in gm.graph.nodes if is_call(node, "conv1d", "cumsum")]
    assert ancestors(found.entry) & {*mixed} == {*mixed[:2]}


@pytest.mark.parametrize("layers", [(Attention, Convolution), (Perceptron, Attention), (Perceptron, Attention, Sum)])
def test_the_cut_stays_at_the_merge_where_no_tokens_meet_before(layers: tuple[type[nn.Module], ...]) -> None:
    _, found = located(Hybrid(*(layer() for layer in layers)))
    assert found.entry is found.merged and found.layer == layers.index(Attention)


def test_a_decoder_that_reads_its_embeddings_again_is_refused() -> None:
    with pytest.raises(AttentionNotFoundError, match="stands in layer 1, behind layers in which tokens meet"):
        located(Hybrid(Convolution(), Attention(), Attention(), x0=True))
    _, found = located(Hybrid(Perceptron(), Attention(), Attention(), x0=True))  # where it does not matter
    assert found.entry is found.merged
    _, found = located(Hybrid(Convolution(), Attention(), x0=True))  # nor here, where nothing reads it later
    assert found.entry is not found.merged


@pytest.mark.parametrize("mixer", [Convolution, Sum])
def test_a_pruned_hybrid_equals_layers_that_are_gathered_by_hand(mixer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Hybrid(mixer(), mixer(), Attention(), mixer(), Attention()).eval()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        graphs.append(run_passes(gm, example_inputs, PassOptions(), PRUNING))
        return graphs[-1]

    compiled = torch.compile(planned(model), backend=backend, dynamic=True, fullgraph=True, isolate_recompiles=True)
    for rows, length, visual in ((2, 12, 5), (2, 17, 6), (3, 40, 20)):
        inputs = prompt(rows, length, visual, seed=length)
        with torch.no_grad(), capture_settings():
            (hidden, *kept), keep, valid, _ = compiled(inputs, plan_of(inputs, 3))
            expected, *kept_by_hand = by_hand(model, inputs, keep, 2)
        assert keep.shape == (rows, length - visual + 3) and valid.all()
        torch.testing.assert_close(hidden, expected)
        for states, others in zip(kept, kept_by_hand, strict=True):
            torch.testing.assert_close(states, others)
    (gm,) = graphs
    assert {kind for _, _, kind in read(gm, Gathered).values} <= {"tokens", "length"}
    # Masks are made in both parts, each time from a mask of that part's length.
    casts = [node for node in gm.graph.nodes if is_call(node, "float")]
    assert len(casts) == 2 and casts[0] in read(gm, Split).full and casts[1] not in read(gm, Split).full


def by_hand(model: Hybrid, inputs: tuple[Tensor, ...], keep: Tensor, layer: int) -> list[Tensor]:
    """The same with tokens removed in front of a layer."""
    ids, features, mask, _ = inputs
    stream, kept, rows = model.embed(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), features), [], len(ids)
    for number, module in enumerate(model.layers):
        if number == layer:
            stream, mask = stream[torch.arange(rows)[:, None], keep], mask[torch.arange(rows)[:, None], keep]
        stream, states = module(stream, mask.float())
        kept.append(states)
    return [stream, *kept]
