"""The operator `hawk::select`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from hawk_compile.kernels.select import reference

if find_spec("triton") is not None:
    from hawk_compile.kernels.select.triton_kernel import launch_select


@torch.library.triton_op("hawk::select", mutates_args={})
def select(
    scores: Tensor, visual_mask: Tensor, token_mask: Tensor, budget: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Choose `length` positions of every row: its non-visual tokens and its `budget` best visual tokens.

    Class 2 is what a row must keep: its real non-visual tokens, and the budget[b] real visual tokens with the highest
    scores (ties: the lower position; NaN counts as 0). Class 1 is padding, class 0 the other visual tokens. A row keeps
    the `length` positions of the highest class, within classes 1 and 0 the lower positions first. Rows that want fewer
    than `length` positions are so filled up, and `valid` says which positions are class 2.

    Args:
        scores: [B, S] float; read at visual tokens only.
        visual_mask: [B, S] bool, True at visual tokens.
        token_mask: [B, S] bool, False at padding.
        budget: [B] int64, how many visual tokens each row keeps; a row with fewer keeps all it has.
        length: how many positions every row keeps: at most S and at least the size of every row's class 2. A class 2
            that is larger loses its highest positions; that is never an access out of bounds.

    Returns:
        keep: [B, length] int64, ascending. valid: [B, length] bool.

    Raises:
        ValueError: a rank or dtype that cannot be right, or a length outside 0..S where both are plain numbers.
    """
    for name, value in (("scores", scores), ("visual_mask", visual_mask), ("token_mask", token_mask)):
        if value.dim() != 2:
            raise ValueError(f"{name} must be [B, S]; got {value.dim()} dimensions: {tuple(value.shape)}. Reshape it.")
    for name, value in (("visual_mask", visual_mask), ("token_mask", token_mask)):
        if value.dtype != torch.bool:
            raise ValueError(f"{name} must be bool; got {value.dtype}. Pass `mask != 0`.")
    if not scores.dtype.is_floating_point:
        raise ValueError(f"scores must have a floating-point dtype; got {scores.dtype}. Convert it with .float().")
    if budget.dim() != 1 or budget.dtype != torch.int64:
        raise ValueError(
            f"budget must be [B] int64, one number of visual tokens per row; got {tuple(budget.shape)} {budget.dtype}. "
            "Convert it with .long(), or expand a single number to the rows."
        )
    # Only plain numbers are compared: on a symbolic size the comparison would become a guard.
    size = scores.shape[1]
    if isinstance(length, int) and isinstance(size, int) and not 0 <= length <= size:
        raise ValueError(
            f"length must be between 0 and S = {size}, the row's positions; got {length}. "
            "Pass the largest number of positions that a row keeps."
        )
    if scores.is_cuda and find_spec("triton") is not None:
        return launch_select(scores, visual_mask, token_mask, budget, length)
    return reference.select(scores, visual_mask, token_mask, budget, length)
