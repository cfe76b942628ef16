"""A weight that is no plain tensor, as libraries that quantise have: it knows a linear with it, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Rounded(Tensor):
    """Rows of 8-bit integers [N, K], each with its scale [N, 1]; looks like float32."""

    def __new__(cls, numbers: Tensor, scale: Tensor) -> Rounded:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def of(cls, weight: Tensor) -> Rounded:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        return self.numbers.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(held: dict[str, Tensor], known: None, size: Any, stride: Any) -> Rounded:
        return Rounded(held["numbers"], held["scale"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rounded({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is linear:
            hidden, weight, *bias = args
            return linear(hidden, weight.plain(), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.detach.default:
            return Rounded(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{operator} is not known to Rounded")


def round_weights(part: nn.Module) -> None:
    """Let every linear layer in a module have such a weight."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Rounded.of(module.weight), requires_grad=False)


def unround_weights(part: nn.Module) -> None:
    """Let every such weight be a plain one with the same numbers."""
    for module in part.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, Rounded):
            module.weight = nn.Parameter(module.weight.plain(), requires_grad=False)
