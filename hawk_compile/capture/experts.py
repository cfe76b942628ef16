"""Experts that a model runs in a loop over those that its tokens have chosen: one operator in the graph instead.

Transformers' own switch (`experts_implementation`) serves most models, whose experts run without such a loop. Where a
class has none, the loop's length is data, which no graph can take. As an operator it is opaque: what it runs is the
model's own forward, so numerics are the model's.

The class belongs to a modeling file, so what stands in for its forward is seen by every model of that file. It makes a
difference only to what Dynamo captures without gradients, and goes with the last model that needs it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import PARAMETERS

ARGUMENTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
"""How transformers calls experts: tokens [N, D], and the ids and weights [N, K] of those that each has chosen."""
SWITCHED = "has_gate"
"""An attribute of experts that transformers can run without a loop."""

originals: dict[Any, Callable[..., Tensor]] = {}
"""The classes' own forwards."""
shells: dict[str, nn.Module] = {}
"""Experts without their weights, by all that tells them from others of their class."""


@torch.library.custom_op("hawk::run_experts", mutates_args=())
def run_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: list[Tensor], experts: str
) -> Tensor:
    """What experts give for tokens [N, D], of the same shape.

    Args:
        weights: of the experts, in the order of their names.
        experts: one of `shells`.
    """
    shell = shells[experts]
    filled = object.__new__(type(shell))
    filled.__dict__.update({**vars(shell), PARAMETERS: dict(zip(vars(shell)[PARAMETERS], weights, strict=True))})
    result = originals[type(shell)](filled, hidden_states, top_k_index, top_k_weights)
    return result.clone() if result is hidden_states else result


@run_experts.register_fake
def _(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: list[Tensor], experts: str
) -> Tensor:
    return torch.empty_like(hidden_states)


def stand_in(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
            return original(self, hidden_states, top_k_index, top_k_weights)
        weights = [getattr(self, name) for name in names_of_weights(self).split(",")]
        return torch.ops.hawk.run_experts(hidden_states, top_k_index, top_k_weights, weights, name_of_shell(self))

    return forward


@torch.compiler.assume_constant_result
def names_of_weights(experts: nn.Module) -> str:
    return ",".join(name for name, weight in experts.named_parameters(recurse=False) if weight is not None)


@torch.compiler.assume_constant_result
def name_of_shell(experts: nn.Module) -> str:
    """What tells experts from others of their class, with which they are run; graphs of equal ones are equal."""
    settings = {name: value for name, value in vars(experts).items() if isinstance(value, (bool, int, float, str))}
    kind = type(experts)
    name = f"{kind.__module__}.{kind.__qualname__}({settings}, {dict(experts.named_children())})"
    if name not in shells:
        shell = object.__new__(kind)
        shell.__dict__.update({**vars(experts), PARAMETERS: dict.fromkeys(names_of_weights(experts).split(","))})
        shells[name] = shell
    return name


def loops_over_choices(module: nn.Module) -> bool:
    """Whether a module is experts that run in a loop, and nothing but their weights tells two of them apart."""
    kind: Any = type(module)
    return (
        arguments_of(kind) == ARGUMENTS and not hasattr(module, SWITCHED)
        and not dict(module.named_buffers()) and not any(child.state_dict() for child in module.children())
    )  # fmt: skip


@functools.cache
def arguments_of(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)


class ExpertsStoodFor(WhileUsed):
    """Lets what is captured of models hold an operator for experts that run in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stand_ins: dict[Any, Callable[..., Tensor]] = {}
        """By class; always the same, since what was captured is guarded by them."""

    def change(self, model: nn.Module | None = None) -> None:
        """For a model's experts; none for a copy of a model that has them already."""
        for kind in {type(each) for each in model.modules() if loops_over_choices(each)} if model is not None else ():
            if kind not in self.stand_ins:
                originals[kind] = kind.forward
                self.stand_ins[kind] = stand_in(kind.forward)
            if kind.forward is originals[kind]:
                kind.forward = self.stand_ins[kind]  # type: ignore[method-assign]

    def undo(self) -> None:
        for kind, ours in self.stand_ins.items():
            if kind.forward is ours:
                kind.forward = originals[kind]


experts_stood_for = ExpertsStoodFor()
