"""Encoders over packed patches, which attend by an index of segments."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from hawk_compile.capture import segments


def test_encoders_attend_by_segments_with_fewer_heads_of_keys() -> None:
    """As each segment does by itself with keys repeated."""
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (4, 2, 2))
    index = segments.patches_of(torch.tensor([0, 3, 5]))
    places = torch.nonzero(index.flatten() >= 0).squeeze(1)
    found, _ = segments.attention_over_segments(
        torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=index, max_length_q=places
    )
    for part in (slice(0, 3), slice(3, 5)):
        alone = scaled_dot_product_attention(*(each[:, :, part] for each in (query, key, value)), enable_gqa=True)
        torch.testing.assert_close(found[:, part], alone.transpose(1, 2))
