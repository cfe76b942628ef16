"""Row copy: out[b, j, r] = values[b, keep[b, j], r], with the trailing dimensions flattened to r."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# What Triton copies as it is. Anything else travels as integers of the same size.
NATIVE = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

TILE = 2048  # elements that one program copies


@triton.jit
def _copy_rows(
    values,  # [B, S, R]
    keep,  # [B, S']
    out,  # [B, S', R] contiguous
    length,  # S'
    width,  # R
    values_batch,
    values_row,
    values_column,
    keep_batch,
    keep_column,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J]
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    # int64 from here on: S * R passes 2^31 for a mask [B, 1, S, S] of 46,341 positions.
    j = j.to(tl.int64)
    r = r.to(tl.int64)
    row = tl.load(keep + batch * keep_batch + j * keep_column, mask=j < length, other=0)  # [BLOCK_J] int64
    inside = (j < length)[:, None] & (r < width)[None, :]  # [BLOCK_J, BLOCK_R]
    source = values + batch * values_batch + row[:, None] * values_row + r[None, :] * values_column
    target = out + (batch * length + j[:, None]) * width + r[None, :]
    tl.store(target, tl.load(source, mask=inside), mask=inside)


def launch_gather(values: Tensor, keep: Tensor) -> Tensor:
    """`reference.gather` by the kernel: values [B, S, ...] of <= 8 bytes an element, keep [B, S'] -> [B, S', ...]."""
    dtype = values.dtype
    shape = (keep.shape[0], keep.shape[1], *values.shape[2:])
    if dtype not in NATIVE:
        values = values.view(INTEGERS[dtype.itemsize])
    if values.dim() == 2:
        values = values.unsqueeze(2)
    elif values.dim() > 3:
        values = values.flatten(2)  # a view where the strides allow one
    batch, length, width = keep.shape[0], keep.shape[1], values.shape[2]
    out = torch.empty((batch, length, width), dtype=values.dtype, device=values.device)
    # A width that is symbolic gets the block of a wide one: a comparison would put a guard on it.
    block_r = min(max(1, triton.next_power_of_2(width)), TILE) if isinstance(width, int) else TILE
    block_j = TILE // block_r
    grid = (triton.cdiv(length, block_j), triton.cdiv(width, block_r), batch)
    wrap_triton(_copy_rows)[grid](
        values,
        keep,
        out,
        length,
        width,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        keep.stride(0),
        keep.stride(1),
        BLOCK_J=block_j,
        BLOCK_R=block_r,
    )
    return out.view(dtype).view(shape)
