"""The operator `hawk::gather`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from hawk_compile.kernels.errors import OperandError
from hawk_compile.kernels.gather import reference
from hawk_compile.kernels.register import triton_op

if find_spec("triton") is not None:
    from hawk_compile.kernels.gather.triton_kernel import launch_gather


@triton_op("hawk::gather")
def gather(values: Tensor, keep: Tensor) -> Tensor:
    """Take each row's kept positions: out[b, j, ...] = values[b, keep[b, j], ...].

    Args:
        values: [B, S, ...], any dtype, any strides.
        keep: [B, S'] int64 positions in 0..S-1, as `hawk::select` gives them.

    Returns:
        [B, S', ...] contiguous, of values' dtype.

    Raises:
        OperandError: a rank or dtype that cannot be right.
    """
    if values.dim() < 2:
        raise OperandError(f"values must be [B, S, ...]; got {tuple(values.shape)}. Add the missing batch dimension.")
    if keep.dim() != 2 or keep.dtype != torch.int64:
        raise OperandError(
            f"keep must be [B, S'] int64; got {tuple(keep.shape)} {keep.dtype}. Pass hawk::select's `keep`."
        )
    # The kernel copies elements of 1, 2, 4 or 8 bytes; the only larger dtype is complex128.
    if values.is_cuda and values.dtype.itemsize <= 8 and find_spec("triton") is not None:
        return launch_gather(values, keep)
    return reference.gather(values, keep)


@gather.register_fake
def _(values: Tensor, keep: Tensor) -> Tensor:
    return values.new_empty((*keep.shape, *values.shape[2:]))
