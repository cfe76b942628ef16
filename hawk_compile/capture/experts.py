"""Experts that a model runs in a loop over those that its tokens have chosen: one operator in the graph instead.

Transformers' own switch (`experts_implementation`) serves most models, whose experts run without such a loop. Where a
class has none, or a model was loaded with "eager", the loop's length is data, which no graph can take.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.capture.shells import Forward, ForwardsStoodFor, description, filled, name_of_shell, weights_of
from hawk_compile.compat.models import experts_of
from hawk_compile.errors import GraphError

ARGUMENTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
"""How transformers calls experts: tokens [N, D], and the ids and weights [N, K] of those that each has chosen."""
SWITCHED = "has_gate"
"""An attribute of experts that transformers can run without a loop; their forward is wrapped around the loop."""


@torch.library.custom_op("hawk::run_experts", mutates_args=())
def run_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: list[Tensor], experts: str
) -> Tensor:
    """What experts give for tokens [N, D], of the same shape and dtype.

    Args:
        weights: of the experts, in the order of their names.
        experts: the name of their shell.

    Raises:
        GraphError: they give something else.
    """
    module = filled(experts, weights)
    loop: Any = experts_stood_for.originals[type(module)]
    loop = loop.__wrapped__ if hasattr(module, SWITCHED) else loop
    result: Tensor = loop(module, hidden_states, top_k_index, top_k_weights)
    if result.dtype != hidden_states.dtype or result.shape != hidden_states.shape:
        raise GraphError(
            f"experts gave {result.dtype} {tuple(result.shape)} for tokens {hidden_states.dtype} "
            f"{tuple(hidden_states.shape)}, which a graph cannot know before they run: call "
            "hawk_compile.restore(model) to run the model whole"
        )
    return result.clone() if result is hidden_states else result


@run_experts.register_fake
def _(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: list[Tensor], experts: str
) -> Tensor:
    return torch.empty_like(hidden_states)


def stand_in(original: Forward) -> Forward:
    @functools.wraps(original)
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        captured = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
        if not captured or not runs_loop(self) or not (shell := name_of_shell(self)):
            return original(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        return torch.ops.hawk.run_experts(hidden_states, top_k_index, top_k_weights, weights_of(self), shell)

    return forward


def loops_over_choices(module: nn.Module) -> bool:
    """Whether a module is experts that run in a loop, and nothing but what is known of them tells two of them apart."""
    kind: Any = type(module)
    return arguments_of(kind) == ARGUMENTS and runs_loop(module) and description(module) is not None


def runs_loop(module: Any) -> bool:
    """Whether transformers' switch stands on the loop, or there is none."""
    return not hasattr(module, SWITCHED) or runs_switched_loop(module)


def runs_switched_loop(module: Any) -> bool:
    """Whether experts run in a loop that transformers can do without."""
    return hasattr(module, SWITCHED) and experts_of(module.config) == "eager"


@functools.cache
def arguments_of(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)


experts_stood_for = ForwardsStoodFor(loops_over_choices, stand_in)
