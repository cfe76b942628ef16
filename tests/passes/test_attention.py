"""Attentions that are written as their steps are found by their softmax, and pruned as the operator is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hawk_compile.errors import AttentionNotFoundError
from hawk_compile.passes.gather_by_shape import gather_by_shape
from hawk_compile.passes.graph import is_call
from hawk_compile.passes.refresh_values import refresh_values
from hawk_compile.passes.site import Gathered, Located, read
from tests.passes import graphs
from tests.passes.sequence import after

sdpa = F.scaled_dot_product_attention


def steps(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    """As transformers' eager attention: keys repeated for the heads, an additive mask, softmax in fp32."""
    weights = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    weights = weights + torch.where(attn_mask, 0.0, torch.finfo(query.dtype).min)
    weights = F.dropout(F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype), p=0.1, training=False)
    return torch.matmul(weights, value)


def capped_with_sinks(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    """A cap on the logits, and one more key that takes a share and has no value."""
    weights = 30 * torch.tanh(query @ key.mT / 30)
    weights = weights.masked_fill(~attn_mask, -torch.inf)
    weights = torch.cat([weights, torch.zeros_like(weights[..., :1])], dim=-1).softmax(-1)[..., :-1]
    return weights @ value


@pytest.mark.parametrize("attend", [steps, capped_with_sinks])
def test_a_softmax_is_the_attention(monkeypatch: pytest.MonkeyPatch, attend) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    gm = after(gather_by_shape, graphs.Decoder())
    located = read(gm, Located)
    assert is_call(located.attention, "softmax") and located.form == "folded"
    assert (located.heads, located.kv_heads, located.head_dim) == (graphs.HEADS, graphs.HEADS, graphs.HEAD_DIM)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    expected = read(after(gather_by_shape, graphs.Decoder()), Gathered).values
    assert [along for _, _, along in read(gm, Gathered).values] == [along for _, _, along in expected]


def test_a_mixture_of_values_that_are_no_tokens_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over a few values of each token, as over the outputs of earlier blocks, in front of the real one."""

    def over_blocks(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        blocks = torch.stack([value, value * 2], dim=-2)  # [B, H, S, 2, d]
        mixed = sdpa(query.unsqueeze(-2), blocks, blocks).squeeze(-2)
        return sdpa(query, key, mixed, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", over_blocks)
    gm = after(refresh_values, graphs.Decoder())
    assert read(gm, Located).attention is [
        node for node in gm.graph.nodes if is_call(node, "scaled_dot_product_attention")][-1]


def test_a_softmax_of_no_product_of_queries_and_keys_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        return value * torch.softmax(query * key, dim=-1)

    monkeypatch.setattr(F, "scaled_dot_product_attention", gated)
    with pytest.raises(AttentionNotFoundError, match="nor a softmax of the product"):
        after(gather_by_shape, graphs.Decoder())
