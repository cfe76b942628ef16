"""The query that all voting tokens share, folded into key space (arXiv 2604.07812; the formulas stand in reference.py).

    _sum_voters   sums over a chunk of the row's voting tokens; the loads of all other rows are masked off
    _average      chunks -> mean_t(x_t), for `score_projected` mean_t(q_t)
    _project      q_bar = W_q mean + b_q
    _fold         u = W_k^T q_bar,  c = b_k . q_bar

An fp32 result that is multiplied with bf16 values leaves as three bf16 pieces that add up to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

CHUNKS = 64  # parts of a row whose question is summed side by side


@triton.jit
def _sum_voters(
    values,  # [B, H, S, D]
    question_mask,  # [B, S] bool or float
    sums,  # [B, H, CHUNKS, D] fp32
    totals,  # [B, CHUNKS] fp32
    heads,
    size,
    width,
    values_batch,
    values_head,
    values_row,
    values_column,
    mask_batch,
    mask_column,
    CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[b, h, chunk] = sum_s m[s] x[s], totals[b, chunk] = sum_s m[s] over the chunk's positions."""
    chunk = tl.program_id(1)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    values += batch * values_batch + head * values_head
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    rows = tl.cdiv(size, CHUNKS)
    end = tl.minimum((chunk + 1) * rows, size)
    total = tl.zeros((BLOCK_S,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(chunk * rows, end, BLOCK_S):
        s = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        vote = tl.load(question_mask + batch * mask_batch + s * mask_column, mask=s < end, other=0).to(tl.float32)
        total += vote
        if tl.max(vote) > 0:
            x = tl.load(
                values + s[:, None] * values_row + d[None, :] * values_column,
                mask=(vote > 0)[:, None] & (d < width)[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_S, BLOCK_D]
            acc += tl.sum(x * vote[:, None], 0)
    tl.store(sums + (tl.program_id(2).to(tl.int64) * CHUNKS + chunk) * width + d, acc, mask=d < width)
    if (tl.program_id(0) == 0) & (head == 0):
        tl.store(totals + batch * CHUNKS + chunk, tl.sum(total))


@triton.jit
def _store_pieces(value, out, piece, inside, PIECES: tl.constexpr):
    """Store fp32 as the sum of PIECES numbers of `out`'s dtype: three bf16 hold the 24 bits of an fp32."""
    for i in tl.static_range(PIECES):
        part = value.to(out.dtype.element_ty)
        tl.store(out + i * piece, part, mask=inside)
        value -= part.to(tl.float32)


@triton.jit
def _average(
    sums,  # [B, H, CHUNKS, D] fp32
    totals,  # [B, CHUNKS] fp32
    mean,  # [B, PIECES, H, D]
    heads,
    width,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.arange(0, CHUNKS)
    part = tl.load(
        sums + (tl.program_id(1).to(tl.int64) * CHUNKS + chunk[:, None]) * width + d[None, :],
        mask=(d < width)[None, :],
        other=0.0,
    )  # [CHUNKS, BLOCK_D]
    total = tl.sum(tl.load(totals + batch * CHUNKS + chunk))
    value = tl.sum(part, 0) / tl.where(total > 0, total, 1.0)  # [BLOCK_D]
    out = mean + (batch * PIECES * heads + head) * width + d
    _store_pieces(value, out, heads * width, d < width, PIECES)


@triton.jit
def _project(
    mean,  # [B, D] fp32
    weight,  # [R, D]
    bias,  # [R]
    query,  # [B, R] fp32
    rows,
    width,
    weight_row,
    weight_column,
    bias_row,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """query[b, r] = weight[r] . mean[b] + bias[r]."""
    batch = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(mean + batch * width + d, mask=d < width, other=0.0)
        w = tl.load(
            weight + r[:, None] * weight_row + d[None, :] * weight_column,
            mask=(r < rows)[:, None] & (d < width)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_R, BLOCK_D]
        acc += w * x[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias + r * bias_row, mask=r < rows, other=0.0).to(tl.float32)
    tl.store(query + batch * rows + r, out, mask=r < rows)


@triton.jit
def _fold(
    query,  # [B, H, d] fp32
    weight,  # [Hkv * d, D]
    bias,  # [Hkv * d]
    folded,  # [B, PIECES, H, D]
    offset,  # [B, H] fp32
    heads,
    group,  # H // Hkv
    head_dim,
    width,
    weight_row,
    weight_column,
    bias_row,
    HAS_BIAS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """folded[b, h] = weight[kv(h)]^T query[b, h], offset[b, h] = bias[kv(h)] . query[b, h]."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    query += (batch * heads + head) * head_dim
    first = (head // group).to(tl.int64) * head_dim  # the KV head's first row
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, head_dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q = tl.load(query + k, mask=k < head_dim, other=0.0)
        w = tl.load(
            weight + (first + k[:, None]) * weight_row + d[None, :] * weight_column,
            mask=(k < head_dim)[:, None] & (d < width)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
        acc += tl.sum(q[:, None] * w, 0)
    out = folded + (batch * PIECES * heads + head) * width + d
    _store_pieces(acc, out, heads * width, d < width, PIECES)
    if HAS_BIAS:  # noqa: SIM102 (known when the kernel is compiled; the next is not)
        if tl.program_id(0) == 0:
            total = tl.zeros((BLOCK_K,), tl.float32)
            for start in range(0, head_dim, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                q = tl.load(query + k, mask=k < head_dim, other=0.0)
                total += q * tl.load(bias + (first + k) * bias_row, mask=k < head_dim, other=0.0).to(tl.float32)
            tl.store(offset + batch * heads + head, tl.sum(total))


def _pieces(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """How many numbers of which dtype stand for an fp32 that is multiplied with values of `dtype`."""
    return (3, torch.bfloat16) if dtype == torch.bfloat16 else (1, torch.float32)


def mean_of_question(values: Tensor, question_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean over voting tokens in the pieces that `dtype` needs, [B, pieces, H, D], and the votes [B, CHUNKS]."""
    batch, heads, size, width = values.shape
    pieces, piece_dtype = _pieces(dtype)
    sums = values.new_empty((batch, heads, CHUNKS, width), dtype=torch.float32)
    totals = values.new_empty((batch, CHUNKS), dtype=torch.float32)
    wrap_triton(_sum_voters)[(triton.cdiv(width, 128), CHUNKS, batch * heads)](
        values,
        question_mask,
        sums,
        totals,
        heads,
        size,
        width,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        values.stride(3),
        question_mask.stride(0),
        question_mask.stride(1),
        CHUNKS=CHUNKS,
        BLOCK_S=64,
        BLOCK_D=128,
    )
    mean = values.new_empty((batch, pieces, heads, width), dtype=piece_dtype)
    wrap_triton(_average)[(triton.cdiv(width, 256), batch * heads)](
        sums, totals, mean, heads, width, CHUNKS=CHUNKS, PIECES=pieces, BLOCK_D=256
    )
    return mean, totals


def fold_query(
    mean: Tensor,  # [B, 1, 1, D] fp32
    q_weight: Tensor,  # [H * d, D]
    q_bias: Tensor | None,  # [H * d]
    k_weight: Tensor,  # [Hkv * d, D]
    k_bias: Tensor | None,  # [Hkv * d]
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """u in the pieces that `dtype` needs, [B, pieces, H, D], and c [B, H] fp32, or None without a key bias."""
    batch, width, rows = mean.shape[0], mean.shape[3], q_weight.shape[0]
    head_dim = rows // heads
    group = heads // (k_weight.shape[0] // head_dim)
    query = mean.new_empty((batch, rows), dtype=torch.float32)
    wrap_triton(_project)[(triton.cdiv(rows, 4), batch)](
        mean,
        q_weight,
        q_weight if q_bias is None else q_bias,
        query,
        rows,
        width,
        q_weight.stride(0),
        q_weight.stride(1),
        0 if q_bias is None else q_bias.stride(0),
        HAS_BIAS=q_bias is not None,
        BLOCK_R=4,
        BLOCK_D=min(2048, triton.next_power_of_2(width)),  # few turns, each with many loads in flight
    )
    pieces, piece_dtype = _pieces(dtype)
    folded = mean.new_empty((batch, pieces, heads, width), dtype=piece_dtype)
    offset = mean.new_empty((batch, heads), dtype=torch.float32)
    wrap_triton(_fold)[(triton.cdiv(width, 64), heads, batch)](
        query,
        k_weight,
        k_weight if k_bias is None else k_bias,
        folded,
        offset,
        heads,
        group,
        head_dim,
        width,
        k_weight.stride(0),
        k_weight.stride(1),
        0 if k_bias is None else k_bias.stride(0),
        HAS_BIAS=k_bias is not None,
        PIECES=pieces,
        BLOCK_K=min(128, triton.next_power_of_2(head_dim)),
        BLOCK_D=64,
    )
    return folded, None if k_bias is None else offset
