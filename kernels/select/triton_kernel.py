"""Selection without a sort: one program per row finds the threshold by radix, then compacts by running counts.

A score becomes an unsigned integer that orders the same way (the sign bit is flipped for x >= 0, all bits for x < 0).
Four passes over the row, a byte each from the top, count the candidates that share the bytes found so far: the
byte of the budget-th best key is the largest one with enough candidates at or above it. After the last pass the key is
known, and how many of the candidates that equal it still fit; those are the lowest positions. One more pass writes.
The row is read in blocks, so its length is limited by memory only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK = 2048  # positions in flight; a row of up to this many is read in one step a pass
BINS = tl.constexpr(256)  # values of a byte


@triton.jit
def _load_masks(visual_mask, token_mask, s, size, visual_column, token_column):
    visual = tl.load(visual_mask + s * visual_column, mask=s < size, other=0) != 0
    token = tl.load(token_mask + s * token_column, mask=s < size, other=0) != 0
    return visual, token


@triton.jit
def _load_key(scores, s, candidate, scores_column):
    """The ordered key of each candidate's score, uint32; -0.0 counts as 0.0 and so does NaN."""
    score = tl.load(scores + s * scores_column, mask=candidate, other=0.0).to(tl.float32)
    score = tl.where((score == 0.0) | (score != score), 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _select_row(
    scores,  # [B, S] float
    visual_mask,  # [B, S] bool
    token_mask,  # [B, S] bool
    budget,  # [B] int64
    keep,  # [B, S'] int64 contiguous
    valid,  # [B, S'] bool contiguous
    size,  # S
    length,  # S'
    scores_batch,
    scores_column,
    visual_batch,
    visual_column,
    token_batch,
    token_column,
    budget_batch,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_batch
    visual_mask += row * visual_batch
    token_mask += row * token_batch
    keep += row * length
    valid += row * length
    lane = tl.arange(0, BLOCK).to(tl.int64)
    bins = tl.arange(0, BINS)

    # How many positions of each kind the row has.
    candidates = 0
    others = 0
    paddings = 0
    text = tl.full((), 2147483647, tl.int64)  # the first non-visual token
    for start in range(0, size, BLOCK):
        s = start + lane  # [BLOCK]
        visual, token = _load_masks(visual_mask, token_mask, s, size, visual_column, token_column)
        candidates += tl.sum((visual & token).to(tl.int32))
        others += tl.sum((~visual & token).to(tl.int32))
        paddings += tl.sum((~token & (s < size)).to(tl.int32))
        text = tl.minimum(text, tl.min(tl.where(token & ~visual, s, 2147483647)))
    text = tl.where(text < size, text, 0)
    wanted = tl.maximum(tl.minimum(tl.load(budget + row * budget_batch), candidates), 0).to(tl.int32)

    # The key of the wanted-th best candidate, a byte at a time, and how many that equal it fit.
    threshold = tl.zeros((), tl.uint32)
    ties = wanted
    for byte in tl.static_range(4):
        counts = tl.zeros((BINS,), tl.int32)
        for start in range(0, size, BLOCK):
            s = start + lane
            visual, token = _load_masks(visual_mask, token_mask, s, size, visual_column, token_column)
            key = _load_key(scores, s, visual & token, scores_column)
            high = key >> (24 - 8 * byte)
            # Two shifts: one by 32 bits, which the first byte would need, is undefined.
            counts += tl.histogram((high & 255).to(tl.int32), BINS, mask=visual & token & ((high >> 8) == threshold))
        at_or_above = tl.sum(counts) - tl.cumsum(counts) + counts  # [BINS], falling
        # With nothing wanted every bin qualifies: the key becomes all ones, which no number has, and 0 ties fit.
        digit = tl.sum((at_or_above >= ties).to(tl.int32)) - 1
        ties -= tl.sum(tl.where(bins > digit, counts, 0))
        threshold = (threshold << 8) | digit.to(tl.uint32)

    # Write: filling where wanted tokens and padding are too few, then both in order, padding as far as the length goes.
    free = length - (others + wanted)
    written = tl.maximum(free - paddings, 0)
    for start in range(0, written, BLOCK):
        slot = start + lane
        tl.store(keep + slot, tl.zeros((BLOCK,), tl.int64) + text, mask=slot < written)
        tl.store(valid + slot, tl.zeros((BLOCK,), tl.int1), mask=slot < written)
    seen_ties = 0
    seen_paddings = 0
    for start in range(0, size, BLOCK):
        s = start + lane
        visual, token = _load_masks(visual_mask, token_mask, s, size, visual_column, token_column)
        candidate = visual & token
        key = _load_key(scores, s, candidate, scores_column)
        tie = (candidate & (key == threshold)).to(tl.int32)
        best = candidate & ((key > threshold) | ((tie != 0) & (seen_ties + tl.cumsum(tie) <= ties)))
        first = (token & ~visual) | best  # class 2
        padding = (~token & (s < size)).to(tl.int32)
        chosen = first | ((padding != 0) & (seen_paddings + tl.cumsum(padding) <= free))
        rank = tl.cumsum(chosen.to(tl.int32))
        slot = written + rank - 1
        fits = chosen & (slot < length)
        tl.store(keep + slot, s, mask=fits)
        tl.store(valid + slot, first, mask=fits)
        seen_ties += tl.sum(tie)
        seen_paddings += tl.sum(padding)
        written += tl.sum(chosen.to(tl.int32))


def launch_select(
    scores: Tensor, visual_mask: Tensor, token_mask: Tensor, budget: Tensor, length: int, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """`reference.select` by the kernel: [B, S] x 3, budget [B] -> keep [B, length] int64, valid [B, length] bool."""
    batch, size = scores.shape
    keep = torch.empty((batch, length), dtype=torch.int64, device=scores.device)
    valid = torch.empty((batch, length), dtype=torch.bool, device=scores.device)
    wrap_triton(_select_row)[(batch,)](
        scores,
        visual_mask,
        token_mask,
        budget,
        keep,
        valid,
        size,
        length,
        scores.stride(0),
        scores.stride(1),
        visual_mask.stride(0),
        visual_mask.stride(1),
        token_mask.stride(0),
        token_mask.stride(1),
        budget.stride(0),
        BLOCK=block,
        num_warps=8,
    )
    return keep, valid
