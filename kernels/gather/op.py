"""The operator `hawk::gather`."""

import torch
from torch import Tensor

from hawk_compile.kernels.gather import reference


@torch.library.triton_op("hawk::gather", mutates_args={})
def gather(values: Tensor, keep: Tensor) -> Tensor:
    """Take each row's kept positions: out[b, j, ...] = values[b, keep[b, j], ...].

    Args:
        values: [B, S, ...], any dtype, any strides.
        keep: [B, S'] int64 positions in 0..S-1, as `hawk::select` gives them.

    Returns:
        [B, S', ...] contiguous, of values' dtype.

    Raises:
        ValueError: a rank or dtype that cannot be right.
    """
    if values.dim() < 2:
        raise ValueError(f"values must be [B, S, ...]; got {tuple(values.shape)}. Add the missing batch dimension.")
    if keep.dim() != 2 or keep.dtype != torch.int64:
        raise ValueError(
            f"keep must be [B, S'] int64; got {tuple(keep.shape)} {keep.dtype}. Pass hawk::select's `keep`."
        )
    return reference.gather(values, keep)
