"""The operator `hawk::select`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from hawk_compile.kernels.errors import OperandError
from hawk_compile.kernels.register import triton_op
from hawk_compile.kernels.select import reference

if find_spec("triton") is not None:
    from hawk_compile.kernels.select.triton_kernel import launch_select


@triton_op("hawk::select")
def select(
    scores: Tensor, visual_mask: Tensor, token_mask: Tensor, budget: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Choose `length` positions of every row: its non-visual tokens and its `budget` best visual tokens.

    A row must keep its real non-visual tokens and the budget[b] real visual tokens with the highest scores (ties: the
    lower position; NaN counts as 0). Where these are fewer than `length`, padding of the row is kept with them, the
    lower positions first. Where even that is not enough, the row is filled up from the left with copies of its first
    non-visual token (position 0 if it has none), as left padding would: no dropped visual token comes back.

    Args:
        scores: [B, S] float; read at visual tokens only.
        visual_mask: [B, S] bool, True at visual tokens.
        token_mask: [B, S] bool, False at padding.
        budget: [B] int64, how many visual tokens each row keeps; a row with fewer keeps all it has.
        length: how many positions every row keeps: at least what every row must keep. A row that must keep more
            loses its highest positions; that is never an access out of bounds.

    Returns:
        keep: [B, length] int64, ascending behind the filling. valid: [B, length] bool, False at padding and filling.

    Raises:
        OperandError: a rank or dtype that cannot be right, or a length outside 0..S where both are plain numbers.
    """
    for name, value in (("scores", scores), ("visual_mask", visual_mask), ("token_mask", token_mask)):
        if value.dim() != 2:
            raise OperandError(
                f"{name} must be [B, S]; got {value.dim()} dimensions: {tuple(value.shape)}. Reshape it."
            )
    for name, value in (("visual_mask", visual_mask), ("token_mask", token_mask)):
        if value.dtype != torch.bool:
            raise OperandError(f"{name} must be bool; got {value.dtype}. Pass `mask != 0`.")
    if not scores.dtype.is_floating_point:
        raise OperandError(f"scores must have a floating-point dtype; got {scores.dtype}. Convert it with .float().")
    if budget.dim() != 1 or budget.dtype != torch.int64:
        raise OperandError(
            f"budget must be [B] int64, one number of visual tokens per row; got {tuple(budget.shape)} {budget.dtype}. "
            "Convert it with .long(), or expand a single number to the rows."
        )
    # Only plain numbers are compared: on a symbolic size the comparison would become a guard.
    size = scores.shape[1]
    if isinstance(length, int) and isinstance(size, int) and not 0 <= length <= size:
        raise OperandError(
            f"length must be between 0 and S = {size}, the row's positions; got {length}. "
            "Pass the largest number of positions that a row keeps."
        )
    if scores.is_cuda and find_spec("triton") is not None:
        return launch_select(scores, visual_mask, token_mask, budget, length)
    return reference.select(scores, visual_mask, token_mask, budget, length)


@select.register_fake
def _(
    scores: Tensor, visual_mask: Tensor, token_mask: Tensor, budget: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], length)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)
