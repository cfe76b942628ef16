"""The definition of the gather in plain PyTorch."""

import torch
from torch import Tensor


def gather(values: Tensor, keep: Tensor) -> Tensor:
    """out[b, j, ...] = values[b, keep[b, j], ...]: [B, S, ...] and [B, S'] -> [B, S', ...]."""
    row = torch.arange(keep.shape[0], device=keep.device).unsqueeze(1)  # [B, 1]
    return values[row, keep].contiguous()
