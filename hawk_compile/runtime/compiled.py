"""The compiled prefill and decode step. No lock is held while one of them runs: only captures take turns."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.attention import eager_of
from hawk_compile.capture.dynamo import RECOMPILE_LIMIT, without_holding
from hawk_compile.capture.prefill import planned_forward
from hawk_compile.capture.states import CompiledByState
from hawk_compile.capture.turns import CompiledInTurns, ending_turn, nothing
from hawk_compile.compat.dynamo import REFUSED_TO_COMPILE
from hawk_compile.compile.backend import compile_graph, inner_compiler, options_of
from hawk_compile.compile.pipeline import PASSES, PLAIN_PASSES, Step
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.kernels.plan.op import slots
from hawk_compile.passes.insert_scoring import Ranks
from hawk_compile.passes.site import Located, read
from hawk_compile.plan.plan import Plan
from hawk_compile.runtime.kinds import kind_of
from hawk_compile.runtime.surroundings import compiling, seen_by_watchers, watchers_around
from hawk_compile.settings.config import HawkConfig

log = logging.getLogger("hawk_compile")

LONGEST = 300
"""Characters of what torch says; its reasons run to many lines."""


class CompiledPrefill:
    """A model's prefill, compiled on its first call. Ratio and head weights are inputs of it, not part of it.

    Attributes:
        compilations: how many graphs were compiled.
        scoring_layer: the decoder layer whose attention scores, counted from 0, once there is a graph.
        watched: the same without generated code, for calls inside modes that are to see every operator.
        forwards: the classes of the modules in its graphs, with their forwards, which Dynamo has inlined and looks at
            no more.
        eager: the eager attention of the model's file, when a graph was captured.
        kinds: the calls that graphs were captured for, without numbers, as `called` was given them; or why one cannot
            be captured again elsewhere.
        saved: what answers a call without a graph of this process; see `hawk_compile.saved`.
    """

    def __init__(self, config: HawkConfig, ranks: Ranks | None = None, passes: Sequence[Step] = PASSES):
        self.config = config
        self.options = options_of(config, ranks=ranks)
        self.ranks, self.passes = ranks, passes
        self.compilations = 0
        self.scoring_layer = 0
        self.watched: CompiledPrefill | None = None
        self.forwards: dict[type, Any] = {}
        self.eager: Any = None
        self.kinds: tuple[Any, ...] = ()
        self.saved: Any = None
        compiler = ending_turn(without_holding(self.compile))
        self.function = CompiledByState(planned_forward, backend=compiler, fullgraph=True)

    def note_forwards(self, model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Remember what a graph of these modules, which is about to be captured, is captured from."""
        self.forwards = {**self.forwards, **{type(part): type(part).forward for _, part in modules}}
        self.eager = eager_of(model)

    def outdated(self, model: PreTrainedModel) -> bool:
        """Whether the forward of a class, or the eager attention in whose place another one was captured, has been
        replaced since."""
        if self.forwards and self.eager is not eager_of(model):
            return True
        return any(kind.forward is not forward for kind, forward in self.forwards.items())  # type: ignore[attr-defined]

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        compiled = compile_graph(gm, example_inputs, self.config, self.options, self.passes)
        self.scoring_layer = read(gm, Located).layer
        return compiled if self.passes is PASSES else shown(compiled)

    def run(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        past_mask: Tensor | None,
        plan: Plan,
        head_weights: Tensor,
        along: tuple[str, ...] = (),
        before_capture: Callable[[], None] = nothing,
    ) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
        """(model output, keep [B, S'], valid [B, S'], scores [B, S]); fills the cache among the inputs.

        Args:
            along: names of the inputs of shape [..., B, S] beside those that every model has.
            before_capture: looks at the model where no graph serves the call.

        Raises:
            UnsupportedCallError: `torch.compiler.set_stance` says that a call which needs a graph is to fail.
        """
        device = head_weights.device
        image, floor = (None, None) if plan.quotas is None else (plan.quotas.image, plan.quotas.floor)
        planned = (
            plan.question_mask, plan.budget, head_weights, *slots(plan.length, plan.visual_slots, device),
            plan.candidates, plan.least, image, floor, plan.question_images,
        )  # fmt: skip
        watchers = watchers_around()
        with compiling():
            if not watchers.any:
                if self.saved is not None and not watchers.function:
                    answer = self.saved.answer(forward, inputs, past_mask, planned, along)
                    if answer is not None:
                        return answer  # type: ignore[no-any-return]
                return self.called(before_capture, forward, inputs, past_mask, planned, along)
            if self.watched is None:
                self.watched = CompiledPrefill(replace(self.config, backend="eager"), self.ranks, PLAIN_PASSES)
            with watchers.aside():
                result = self.watched.called(before_capture, forward, inputs, past_mask, planned, along)
            self.scoring_layer = self.watched.scoring_layer
            return result

    def called(self, before_capture: Callable[[], None], *args: Any) -> Any:
        def noted() -> None:
            before_capture()
            log.info("capturing a prefill of a new kind, to be compiled by %s", self.config.backend)
            self.kinds = (*self.kinds, kind_of(*args))[-RECOMPILE_LIMIT:]

        try:
            return self.function.call(noted, *args)
        except RuntimeError as error:
            if REFUSED_TO_COMPILE not in str(error):
                raise
            raise UnsupportedCallError(
                f'torch.compiler.set_stance("{REFUSED_TO_COMPILE}") is on, and no graph that was compiled serves this '
                "call: make a call of its kind (as many rows, padded or not, cache or none) before the stance is set, "
                f"or set another. torch says: {' '.join(str(error).split())[:LONGEST]}"
            ) from error


def shown(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A graph that modes see, which are set aside while it is captured."""

    def run(*args: Any) -> Any:
        with seen_by_watchers():
            return compiled(*args)

    return run


class CompiledStep:
    """A model's decode step, compiled on its first call.

    With options beside the backend (those that generate gives for caches of fixed size) only torch.compile knows what
    compiles it, so other captures wait until that first call is over.
    """

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]):
        if options.keys() == {"backend"}:
            options = {"backend": ending_turn(inner_compiler(options["backend"]))}
        self.function = CompiledInTurns(forward, **options)

    def run(self, inputs: dict[str, Any]) -> Any:
        """The model's output for one token of each row, [B, 1]; fills the cache among the inputs."""
        return self.function(**inputs)
