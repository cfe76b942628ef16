"""HAWK's scores with one read of the visual rows (arXiv 2604.07812; the formulas stand in reference.py).

    triton_query  the query that all voting tokens share: u and c, for `score_projected` mean_t(q_t)
    _raw_scores   u . x_v for the visual rows: the only pass over the sequence, bound by memory: V * D elements
    _statistics   raw = (u . x_v + c) / sqrt(d) and what the normalisation needs of each block of positions
    _combine      score = sum_h w[h] * normalised raw

Blocks leave partial results that the next kernel adds up in a fixed order, so equal inputs give equal bits: an atomic
addition would not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from hawk_compile.kernels.score import reference
from hawk_compile.kernels.score.triton_query import CHUNKS, fold_query, mean_of_question

STATISTICS_BLOCK = 1024  # positions behind one partial statistic
FLOOR = tl.constexpr(reference.FLOOR)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
L2, SOFTMAX, MINMAX = (tl.constexpr(reference.NORMALIZATIONS.index(name)) for name in ("l2", "softmax", "minmax"))


@triton.jit
def _raw_scores(
    values,  # [B, Hkv, S, D]
    visual_mask,  # [B, S] bool
    folded,  # [B, PIECES, H, D]
    partial,  # [B, splits, H, S] fp32; written at visual positions only
    heads,
    group,  # H // Hkv
    splits,
    span,  # columns of a split, a multiple of BLOCK_D
    size,
    width,
    values_batch,
    values_head,
    values_row,
    values_column,
    mask_batch,
    mask_column,
    PIECES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_D divides the width
):
    """partial[b, split, h, s] = sum over the split's columns of folded[b, h] . values[b, kv(h), s]."""
    kv_head = tl.program_id(1) // splits
    split = tl.program_id(1) % splits
    batch = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    h = tl.arange(0, BLOCK_H)  # within the group
    visual = tl.load(visual_mask + batch * mask_batch + s * mask_column, mask=s < size, other=0) != 0
    # A block without visual tokens, such as one of text, costs nothing.
    if tl.max(visual.to(tl.int32)) > 0:
        values += batch * values_batch + kv_head.to(tl.int64) * values_head
        head = kv_head * group + tl.minimum(h, group - 1)
        # Rows past the end and rows of text are read as well, which costs less than a mask: a row's product is its own.
        row = tl.minimum(s, size - 1)
        acc = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
        for start in range(split * span, tl.minimum((split + 1) * span, width), BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            at = values + row[:, None] * values_row + d[None, :] * values_column
            x = tl.load(at) if EVEN else tl.load(at, mask=(d < width)[None, :], other=0.0)  # [BLOCK_S, BLOCK_D]
            for i in tl.static_range(PIECES):
                at = folded + ((batch * PIECES + i) * heads + head[None, :]) * width + d[:, None]
                u = tl.load(at) if EVEN else tl.load(at, mask=(d < width)[:, None], other=0.0)  # [BLOCK_D, BLOCK_H]
                # fp32's precision for each: bf16 goes to the tensor cores with u in pieces; an fp16 x is exact in
                # tf32, so that tf32x3 loses only u's last bits; fp32 needs plain fp32 products.
                if x.dtype == tl.bfloat16:
                    acc = tl.dot(x, u, acc)
                elif x.dtype == tl.float16:
                    acc = tl.dot(x.to(tl.float32), u, acc, input_precision="tf32x3")
                else:
                    acc = tl.dot(x.to(tl.float32), u, acc, input_precision="ieee")
        tl.store(
            partial + ((batch * splits + split) * heads + head[None, :]) * size + s[:, None],
            acc,
            mask=visual[:, None] & (h < group)[None, :],
        )


@triton.jit
def _statistics(
    partial,  # [B, splits, H, S] fp32; split 0 receives the raw scores
    offset,  # [B, H] fp32
    visual_mask,  # [B, S] bool
    statistics,  # [B, H, blocks, 2] fp32
    scale,
    heads,
    splits,
    size,
    mask_batch,
    mask_column,
    MODE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """raw[b, h, s], and of each block: (sum of squares, 0), (max, sum of exponentials) or (min, max)."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    s = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    visual = tl.load(visual_mask + batch * mask_batch + s * mask_column, mask=s < size, other=0) != 0
    source = partial + (batch * splits * heads + head) * size + s
    raw = tl.zeros((BLOCK,), tl.float32)
    at = source
    for _ in range(splits):
        raw += tl.load(at, mask=visual, other=0.0)
        at += heads * size
    if HAS_OFFSET:
        raw += tl.load(offset + batch * heads + head)
    raw = raw * scale
    raw = tl.where(visual & (tl.abs(raw) <= LARGEST), raw, 0.0)  # false for NaN too
    tl.store(source, raw, mask=visual)

    if MODE == L2:
        first = tl.sum(raw * raw)
        second = 0.0
    elif MODE == SOFTMAX:
        first = tl.max(tl.where(visual, raw, -LARGEST))
        second = tl.sum(tl.where(visual, tl.exp(raw - first), 0.0))
    else:
        first = tl.min(tl.where(visual, raw, LARGEST))
        second = tl.max(tl.where(visual, raw, -LARGEST))
    out = statistics + ((batch * heads + head) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(out, first)
    tl.store(out + 1, second)


@triton.jit
def _combine(
    partial,  # [B, splits, H, S] fp32, raw scores in split 0
    statistics,  # [B, H, blocks, 2] fp32
    totals,  # [B, CHUNKS] fp32
    visual_mask,  # [B, S] bool
    head_weights,  # [H]
    scores,  # [B, S] fp32
    heads,
    splits,
    blocks,
    size,
    mask_batch,
    mask_column,
    weights_row,
    MODE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """scores[b, s] = sum_h w[h] * (raw[h, s] - shift[h]) / span[h], or its exponential over the sum of all."""
    batch = tl.program_id(1).to(tl.int64)
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_N)

    # The row's statistics from those of its blocks.
    if MODE == L2:
        first = tl.zeros((BLOCK_H,), tl.float32)
    elif MODE == SOFTMAX:
        first = tl.full((BLOCK_H,), -LARGEST, tl.float32)
    else:
        first = tl.full((BLOCK_H,), LARGEST, tl.float32)
    second = tl.full((BLOCK_H,), -LARGEST, tl.float32) if MODE == MINMAX else tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, blocks, BLOCK_N):
        inside = (h < heads)[:, None] & (start + n < blocks)[None, :]
        at = statistics + ((batch * heads + h[:, None]) * blocks + start + n[None, :]) * 2  # [BLOCK_H, BLOCK_N]
        if MODE == L2:
            first += tl.sum(tl.load(at, mask=inside, other=0.0), 1)
        elif MODE == SOFTMAX:
            top = tl.load(at, mask=inside, other=-LARGEST)
            highest = tl.maximum(first, tl.max(top, 1))
            rescaled = tl.load(at + 1, mask=inside, other=0.0) * tl.exp(top - highest[:, None])
            second = second * tl.exp(first - highest) + tl.sum(rescaled, 1)
            first = highest
        else:
            first = tl.minimum(first, tl.min(tl.load(at, mask=inside, other=LARGEST), 1))
            second = tl.maximum(second, tl.max(tl.load(at + 1, mask=inside, other=-LARGEST), 1))

    visual = tl.load(visual_mask + batch * mask_batch + s * mask_column, mask=s < size, other=0) != 0
    raw = tl.load(
        partial + (batch * splits * heads + h[:, None]) * size + s[None, :],
        mask=(h < heads)[:, None] & visual[None, :],
        other=0.0,
    )  # [BLOCK_H, BLOCK_S]
    if MODE == L2:
        share = raw / tl.maximum(tl.sqrt_rn(first), FLOOR)[:, None]
    elif MODE == SOFTMAX:
        share = tl.exp(raw - first[:, None]) / tl.maximum(second, FLOOR)[:, None]
    else:
        share = (raw - first[:, None]) / tl.maximum(second - first, FLOOR)[:, None]
    weight = tl.load(head_weights + h * weights_row, mask=h < heads, other=0.0).to(tl.float32)
    # Rows of heads that do not exist, and rows without visual tokens, may hold anything here.
    share = tl.where((h < heads)[:, None] & visual[None, :], share * weight[:, None], 0.0)
    votes = tl.sum(tl.load(totals + batch * CHUNKS + tl.arange(0, CHUNKS)))
    tl.store(scores + batch * size + s, tl.where(votes > 0, tl.sum(share, 0), 0.0), mask=s < size)


def launch_folded(
    hidden: Tensor,  # [B, S, D]
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, S] bool or float
    q_weight: Tensor,  # [H * d, D]
    q_bias: Tensor | None,  # [H * d]
    k_weight: Tensor,  # [Hkv * d, D]
    k_bias: Tensor | None,  # [Hkv * d]
    head_weights: Tensor,  # [H]
    normalization: str,
) -> Tensor:
    """`reference.score_folded` by the kernels: [B, S] fp32."""
    heads = head_weights.shape[0]
    head_dim = q_weight.shape[0] // heads
    values = hidden.unsqueeze(1)  # [B, 1, S, D]

    mean, totals = mean_of_question(values, question_mask, torch.float32)  # [B, 1, 1, D], [B, CHUNKS]
    folded, offset = fold_query(mean, q_weight, q_bias, k_weight, k_bias, heads, hidden.dtype)
    return _score(values, folded, offset, visual_mask, totals, head_weights, heads, head_dim, normalization)


def launch_projected(
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, Hkv, S, d]
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, S] bool or float
    head_weights: Tensor,  # [H]
    normalization: str,
) -> Tensor:
    """`reference.score_projected` by the kernels: [B, S] fp32."""
    mean, totals = mean_of_question(query, question_mask, key.dtype)  # [B, PIECES, H, d]
    group = query.shape[1] // key.shape[1]
    return _score(key, mean, None, visual_mask, totals, head_weights, group, query.shape[3], normalization)


def _score(
    values: Tensor,  # [B, Hkv, S, D]
    folded: Tensor,  # [B, pieces, H, D]
    offset: Tensor | None,  # [B, H] fp32
    visual_mask: Tensor,  # [B, S] bool
    totals: Tensor,  # [B, CHUNKS] fp32
    head_weights: Tensor,  # [H]
    group: int,  # query heads that share one of values' heads
    head_dim: int,
    normalization: str,
) -> Tensor:
    """[B, S] fp32 by three kernels: raw relevance, what normalises it over a row, and the sum over heads."""
    mode = reference.NORMALIZATIONS.index(normalization)
    partial = launch_raw_scores(values, folded, visual_mask, group)
    statistics = launch_statistics(partial, offset, visual_mask, head_dim, mode)
    return launch_combine(partial, statistics, totals, visual_mask, head_weights, mode)


def launch_raw_scores(
    values: Tensor,  # [B, Hkv, S, D]
    folded: Tensor,  # [B, pieces, H, D]
    visual_mask: Tensor,  # [B, S] bool
    group: int,
) -> Tensor:
    """[B, splits, H, S] fp32: relevance before scale and offset, its columns D in `splits` parts."""
    batch, kv_heads, size, width = values.shape
    pieces, heads = folded.shape[1], folded.shape[2]
    # A short row has too few blocks of positions to fill the device, so its columns are shared out as well. The number
    # follows from the width alone, since the number of positions may be symbolic.
    block_s, block_d = 64, 64
    splits = 1 if width < 1024 else 2
    span = triton.cdiv(triton.cdiv(width, splits), block_d) * block_d
    partial = values.new_empty((batch, splits, heads, size), dtype=torch.float32)
    wrap_triton(_raw_scores)[(triton.cdiv(size, block_s), kv_heads * splits, batch)](
        values,
        visual_mask,
        folded,
        partial,
        heads,
        group,
        splits,
        span,
        size,
        width,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        values.stride(3),
        visual_mask.stride(0),
        visual_mask.stride(1),
        PIECES=pieces,
        BLOCK_S=block_s,
        BLOCK_H=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        EVEN=width % block_d == 0,
        num_warps=4,
        num_stages=4 if values.dtype.itemsize == 2 else 3,
    )
    return partial


def launch_statistics(
    partial: Tensor,  # [B, splits, H, S] fp32
    offset: Tensor | None,  # [B, H] fp32
    visual_mask: Tensor,  # [B, S] bool
    head_dim: int,
    mode: int,
) -> Tensor:
    """[B, H, blocks, 2] fp32: what each head is normalised by, by block. Leaves raw scores in split 0 of `partial`."""
    batch, splits, heads, size = partial.shape
    blocks = triton.cdiv(size, STATISTICS_BLOCK)
    statistics = partial.new_empty((batch, heads, blocks, 2), dtype=torch.float32)
    wrap_triton(_statistics)[(blocks, heads, batch)](
        partial,
        partial if offset is None else offset,
        visual_mask,
        statistics,
        head_dim**-0.5,
        heads,
        splits,
        size,
        visual_mask.stride(0),
        visual_mask.stride(1),
        MODE=mode,
        HAS_OFFSET=offset is not None,
        BLOCK=STATISTICS_BLOCK,
    )
    return statistics


def launch_combine(
    partial: Tensor,  # [B, splits, H, S] fp32
    statistics: Tensor,  # [B, H, blocks, 2] fp32
    totals: Tensor,  # [B, CHUNKS] fp32
    visual_mask: Tensor,  # [B, S] bool
    head_weights: Tensor,  # [H]
    mode: int,
) -> Tensor:
    """[B, S] fp32: the heads, each normalised and weighted, added up."""
    batch, splits, heads, size = partial.shape
    scores = partial.new_empty((batch, size), dtype=torch.float32)
    block_h = triton.next_power_of_2(heads)
    block_s = 128 if block_h <= 32 else 32
    wrap_triton(_combine)[(triton.cdiv(size, block_s), batch)](
        partial,
        statistics,
        totals,
        visual_mask,
        head_weights,
        scores,
        heads,
        splits,
        statistics.shape[2],
        size,
        visual_mask.stride(0),
        visual_mask.stride(1),
        head_weights.stride(0),
        MODE=mode,
        CHUNKS=CHUNKS,
        BLOCK_H=block_h,
        BLOCK_N=16,
        BLOCK_S=block_s,
    )
    return scores
