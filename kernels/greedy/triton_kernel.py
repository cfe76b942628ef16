"""Greedy orders by one launch: programs that own a part of a row's tokens each, and meet after every step.

A step needs the similarity of every token to the one just taken, and nothing else: each program reads the features of
its own tokens that are still left, updates what taking each would gain, and leaves its best one for all to see. They
wait for one another by a counter per row, so all of them must run at once: the grid is no larger than the device. No
step returns to the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from hawk_compile.kernels.greedy import reference

BLOCK, WIDTH = 16, 256  # tokens and elements of their features in flight
STEPS = 16  # rows of the Cholesky factor in flight
NONE = tl.constexpr(2147483647)
MAX_MIN, MMR, DPP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ROUNDING = tl.constexpr(reference.ROUNDING)


@triton.jit
def _meet(arrived, target):
    """Wait until `target` arrivals have been counted; what was written before is seen by all afterwards."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel")
    while tl.atomic_add(arrived, 0, sem="acq_rel") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _best(gain, s, best, place):
    """The better of the best so far and the best of a block; of equal ones, the lowest position."""
    top = tl.max(gain)
    at = tl.min(tl.where(gain == top, s, NONE))
    return tl.maximum(best, top), tl.where(top > best, at, place)


@triton.jit
def _take(
    features,  # [B, S, D] float
    inverse,  # [B, S] float32, one over the features' length
    scaled,  # [B, S] float32, importance in [0, 1]
    gain,  # [B, S] float32, of taking each token next; -inf where it is no choice
    closest,  # [B, S] float32, similarity to the closest token taken (MMR)
    factor,  # [B, steps, S] float32, the growing Cholesky factor (DPP)
    values,  # [B, 2, PARTS] float32, every program's best gain, by the step's parity
    places,  # [B, 2, PARTS] int32, and where it is
    arrived,  # [B] int32
    order,  # [B, S] float32
    budget,  # [B] int64
    rows,  # B
    size,  # S
    width,  # D
    factor_batch,
    features_batch,
    features_row,
    features_column,
    weight,
    RULE: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    features += row * features_batch
    inverse += row * size
    scaled += row * size
    gain += row * size
    closest += row * size
    factor += row * factor_batch
    line = factor  # of this step
    values += row * 2 * PARTS
    places += row * 2 * PARTS
    order += row * size
    token, element, lane = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, LANES)
    steps = tl.zeros((), tl.int32)
    for each in range(rows):
        steps = tl.maximum(steps, tl.load(budget + each).to(tl.int32))

    best, place = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int32)
    for start in range(part * BLOCK, size, PARTS * BLOCK):
        s = start + token
        best, place = _best(tl.load(gain + s, mask=s < size, other=float("-inf")), s, best, place)
    tl.store(values + part, best)
    tl.store(places + part, place)
    _meet(arrived + row, PARTS)

    for step in range(steps):
        now, then = (step % 2) * PARTS, ((step + 1) % 2) * PARTS
        # Past the first level of cache, which other programs' writes do not reach.
        found = tl.load(values + now + lane, mask=lane < PARTS, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(places + now + lane, mask=lane < PARTS, other=0, cache_modifier=".cg")
        top = tl.max(found)
        left = top > (ROUNDING if RULE == DPP else float("-inf"))
        winner = tl.where(left, tl.min(tl.where(found == top, where, NONE)), 0)
        tl.store(order + winner, (steps - step).to(tl.float32), mask=left & (part == 0))
        own = tl.load(inverse + winner)
        mine = tl.load(scaled + winner)
        best, place = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int32)
        for start in range(part * BLOCK, tl.where(left, size, 0), PARTS * BLOCK):
            s = start + token
            before = tl.load(gain + s, mask=s < size, other=float("-inf"))
            live = (before > float("-inf")) & (s != winner)
            tile = tl.zeros((BLOCK, WIDTH), tl.float32)
            for d in range(0, width, WIDTH):
                e = (d + element).to(tl.int64)
                taken = tl.load(features + winner.to(tl.int64) * features_row + e * features_column, mask=e < width,
                                other=0.0).to(tl.float32)  # fmt: skip
                held = tl.load(features + s.to(tl.int64)[:, None] * features_row + e[None, :] * features_column,
                               mask=live[:, None] & (e < width)[None, :], other=0.0).to(tl.float32)  # fmt: skip
                tile += held * taken[None, :]
            similar = tl.sum(tile, 1) * own * tl.load(inverse + s, mask=live, other=0.0)
            if RULE == DPP:
                value = tl.load(scaled + s, mask=live, other=0.0) * similar * mine
                for first in range(0, step, STEPS):
                    j = first + tl.arange(0, STEPS)
                    theirs = tl.load(factor + j.to(tl.int64) * size + winner, mask=j < step, other=0.0,
                                     cache_modifier=".cg")  # fmt: skip
                    ours = tl.load(factor + j.to(tl.int64)[:, None] * size + s[None, :],
                                   mask=(j < step)[:, None] & live[None, :], other=0.0)  # fmt: skip
                    value -= tl.sum(ours * theirs[:, None], 0)
                value = value / tl.sqrt(top)
                tl.store(line + s, value, mask=live)
                after = before - value * value
            else:
                nearest = tl.maximum(tl.load(closest + s, mask=live, other=0.0), similar)
                tl.store(closest + s, nearest, mask=live)
                if RULE == MMR:
                    after = weight * tl.load(scaled + s, mask=live, other=0.0) - (1 - weight) * nearest
                else:
                    after = -nearest
            after = tl.where(live, after, float("-inf"))
            tl.store(gain + s, after, mask=s < size)
            best, place = _best(after, s, best, place)
        line += size
        tl.store(values + then + part, best)
        tl.store(places + then + part, place)
        _meet(arrived + row, PARTS * (step + 2))


def launch_greedy_order(
    features: Tensor, importance: Tensor, visual_mask: Tensor, budget: Tensor, rule: str, weight: float,
    programs: int | None = None, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """`reference.greedy_order` by the kernel; `programs` is how many run at once (None: as the device has places)."""
    rows, size, width = features.shape
    device = features.device
    if programs is None:
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    parts = max(1, min(programs // max(rows, 1), triton.cdiv(size, block)))

    def state(*shape: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    scaled = reference.unit_range(importance.float(), visual_mask)
    unit = torch.nn.functional.normalize(features.float(), dim=-1) if rule == "max_min" else features
    gain = reference.first_gain(rule, unit, scaled, visual_mask).masked_fill(~visual_mask, -torch.inf)
    inverse = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
    most = int(budget.max()) if rule == "dpp" and budget.numel() and device.type != "meta" else 1
    factor = torch.empty((rows, most, size), device=device, dtype=torch.float32)
    order = state(rows, size)
    wrap_triton(_take)[(rows * parts,)](
        features,
        inverse,
        scaled,
        gain.contiguous(),
        state(rows, size, value=-torch.inf),
        factor,
        state(rows, 2, parts),
        state(rows, 2, parts, dtype=torch.int32),
        state(rows, dtype=torch.int32),
        order,
        budget.contiguous(),
        rows,
        size,
        width,
        factor.stride(0),
        *features.stride(),
        weight,
        RULE=list(reference.RULES).index(rule),
        PARTS=parts,
        LANES=triton.next_power_of_2(parts),
        BLOCK=block,
        WIDTH=WIDTH,
        STEPS=STEPS,
        num_warps=8,
        # All programs must be there when they wait for one another.
        **({"launch_cooperative_grid": True} if device.type == "cuda" else {}),
    )
    return reference.rest_by_importance(order, scaled, visual_mask, budget.amax()) if rule == "dpp" and rows else order
