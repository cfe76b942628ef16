"""A pruned prefill has no gradients: its results say so when these are asked of them."""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hawk_compile.errors import UnsupportedCallError


def refuse_gradients(result: ModelOutput) -> None:
    """Let logits and hidden states say why they have no gradients when these are asked for."""
    def refusing(value: Tensor) -> Tensor:
        return RefuseBackward.apply(value.detach().requires_grad_())

    result["logits"] = refusing(result["logits"])
    if "hidden_states" in result:
        result["hidden_states"] = tuple(
            each if each is None else refusing(each) for each in result["hidden_states"])  # None: a layer not asked for


class RefuseBackward(torch.autograd.Function):
    """Values that can be read as always, and that say so when gradients are asked of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UnsupportedCallError(
            "gradients were asked of a pruned prefill, which has none: hawk_compile.restore the model to train it"
        )
