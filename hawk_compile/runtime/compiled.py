"""The compiled prefill and decode step. No lock is held while one of them runs: only its first calls take turns.

Dynamo's settings are each thread's own (`torch._dynamo.config.patch`), and Dynamo compiles one function at a time. What
the lock guards is the code of the models, which an export changes for the whole process while it traces: a call that
has to be captured waits for it. It also lets threads that meet a new structure at once share one compilation.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from hawk_compile.capture.dynamo import capture_lock, capture_settings, compile_alone
from hawk_compile.capture.prefill import planned_forward
from hawk_compile.compile.backend import compile_graph, options_of
from hawk_compile.kernels.plan.op import slots
from hawk_compile.passes.insert_scoring import Ranks
from hawk_compile.plan.plan import Plan
from hawk_compile.settings.config import HawkConfig


class Turns:
    """First calls of each structure one at a time, all others side by side."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    @contextlib.contextmanager
    def taking(self, *arguments: Any) -> Iterator[None]:
        """Around a call with these arguments; Dynamo's settings are those of a capture inside."""
        structure = (structure_of(arguments), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        first = structure not in self.seen
        with capture_lock if first else contextlib.nullcontext(), capture_settings():
            yield
        self.seen.add(structure)


def structure_of(value: Any) -> Any:
    """What two calls share that one compiled graph serves, as far as it can be seen cheaply.

    It need not be exact: where it is too coarse, two threads may compile the same; too fine, one waits for another.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(size == 1 for size in value.shape)
    if isinstance(value, Mapping):
        return tuple((name, structure_of(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(structure_of(part) for part in value)
    if isinstance(value, Cache):
        return type(value), len(value.layers), value.is_initialized
    return value if isinstance(value, (bool, str)) else type(value)


class CompiledPrefill:
    """A model's prefill, compiled on its first call. Ratio and head weights are inputs of it, not part of it."""

    def __init__(self, config: HawkConfig, ranks: Ranks | None = None):
        self.config = config
        self.options = options_of(config, ranks=ranks)
        self.compilations = 0
        self.turns = Turns()
        self.function = compile_alone(planned_forward, backend=self.compile, fullgraph=True)

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return compile_graph(gm, example_inputs, self.config, self.options)

    def run(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        past_mask: Tensor | None,
        plan: Plan,
        head_weights: Tensor,
        along: tuple[str, ...] = (),
    ) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
        """(model output, keep [B, S'], valid [B, S'], scores [B, S]); fills the cache among the inputs.

        Args:
            along: names of the inputs of shape [..., B, S] beside those that every model has.
        """
        device = head_weights.device
        image, floor = (None, None) if plan.quotas is None else (plan.quotas.image, plan.quotas.floor)
        planned = (
            plan.votes, plan.budget, head_weights, *slots(plan.length, sum(plan.kept), device), plan.candidates,
            plan.least, image, floor,
        )  # fmt: skip
        with self.turns.taking(inputs, past_mask, planned):
            return self.function(forward, inputs, past_mask, planned, along)


class CompiledStep:
    """A model's decode step, compiled on its first call."""

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]):
        self.turns = Turns()
        self.function = compile_alone(forward, **options)

    def run(self, inputs: dict[str, Any]) -> Any:
        """The model's output for one token of each row, [B, 1]; fills the cache among the inputs."""
        with self.turns.taking(inputs):
            return self.function(**inputs)
