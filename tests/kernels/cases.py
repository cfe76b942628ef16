"""Inputs for the score operators: sizes, masks, and what can be wrong with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """Widths of a layer and, per row, its layout: (padding, text, visual, text) positions."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    rows: tuple[tuple[int, int, int, int], ...]


SIZES = {
    "two KV heads, width 24": Sizes(4, 2, 8, 24, ((0, 3, 20, 6),)),
    "one head, one visual token": Sizes(1, 1, 8, 16, ((0, 2, 1, 3),)),
    "28 heads, 4 KV heads": Sizes(28, 4, 4, 40, ((0, 5, 126, 5),)),
    "three rows, one without visual tokens": Sizes(6, 6, 5, 33, ((0, 2, 15, 4), (7, 2, 9, 3), (17, 1, 0, 3))),
    # Wide enough for the columns of a row to be shared out among programs.
    "width 1,100": Sizes(2, 1, 12, 1100, ((0, 1, 6, 2),)),
}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def masks(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """visual_mask, question_mask (the text behind the visual tokens) and token_mask, each [B, S] bool."""
    size = max(sum(row) for row in sizes.rows)
    visual, query, token = (torch.zeros(len(sizes.rows), size, dtype=torch.bool) for _ in range(3))
    for b, (padding, before, inside, after) in enumerate(sizes.rows):
        assert padding + before + inside + after == size
        token[b, padding:] = True
        visual[b, padding + before : padding + before + inside] = True
        query[b, size - after :] = True
    return visual, query, token


def folded(sizes: Sizes, dtype: torch.dtype, normalization: str, bias: bool = True) -> list:
    """Arguments of score_folded. What may not be read, padding and text that does not vote, holds NaN."""
    visual, query, _ = masks(sizes)
    hidden = draw(*visual.shape, sizes.width, seed=1, dtype=dtype)
    hidden[~(visual | query)] = float("nan")
    q_rows, k_rows = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    scale = sizes.width**-0.5
    return [
        hidden,
        visual,
        query,
        (draw(q_rows, sizes.width, seed=2) * scale).to(dtype),
        draw(q_rows, seed=3, dtype=dtype) if bias else None,
        (draw(k_rows, sizes.width, seed=4) * scale).to(dtype),
        draw(k_rows, seed=5, dtype=dtype) if bias else None,
        head_weights(sizes.heads),
        normalization,
    ]


def projected(sizes: Sizes, dtype: torch.dtype, normalization: str) -> list:
    """Arguments of score_projected, likewise."""
    visual, query, _ = masks(sizes)
    batch, size = visual.shape
    q = draw(batch, sizes.heads, size, sizes.head_dim, seed=6, dtype=dtype)
    k = draw(batch, sizes.kv_heads, size, sizes.head_dim, seed=7, dtype=dtype)
    q.transpose(1, 2)[~query] = float("nan")
    k.transpose(1, 2)[~visual] = float("nan")
    return [q, k, visual, query, head_weights(sizes.heads), normalization]


def head_weights(heads: int) -> Tensor:
    weights = torch.rand(heads, generator=torch.Generator().manual_seed(8))
    return weights / weights.sum()


def scattered(tensor: Tensor) -> Tensor:
    """The same values in memory where no dimension is contiguous, with NaN (or True, or -7) between them."""
    value = True if tensor.dtype == torch.bool else float("nan") if tensor.dtype.is_floating_point else -7
    reverse = tuple(reversed(range(tensor.dim())))
    wide = torch.full(tuple(2 * n + 1 for n in reversed(tensor.shape)), value, dtype=tensor.dtype).permute(reverse)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view
