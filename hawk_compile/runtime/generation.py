"""One call of `generate`: what lasts from one of its steps to the next where no cache carries it, and which forwards
are its own.

A logits processor, a stopping criterion or a streamer may ask any model anything while a call of generate is under way,
the same model too: none of the call's state is for such forwards. Its own are known by the tensor of ids or embeddings
that they are given, which `prepare_inputs_for_generation` has made for this step.
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hawk_compile.runtime.asked import AskedQuestion
from hawk_compile.runtime.records import PrefillRecord


@dataclass
class Generation:
    """A call of generate that is under way in this thread or task.

    Attributes:
        model: whose generate it is.
        prompt_length: where every step prefills anew (`use_cache=False`): the ids of the prompt. What stands behind
            them was generated and has no vote.
        record: what the prefill of the prompt did.
        question: what this call says of who votes.
        begun: whether a forward of it has run: a single token behind that is one that the model has chosen.
        inputs: its arguments by name.
        repeats: whether its next forward is given the whole conversation, which its cache holds but for the end.
        made: the ids or embeddings that were made for its next forward.
        tells: whether a forward was given them. Until one is, nothing tells its own forwards from others: what others
            have put in the place of `prepare_inputs_for_generation` may make inputs that are not seen, or a hook move
            them.
    """

    model: Any
    prompt_length: int | None = None
    record: PrefillRecord | None = None
    question: AskedQuestion | None = None
    begun: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    repeats: bool = False
    made: tuple["weakref.ref[Tensor]", ...] = ()
    tells: bool = False

    def takes(self, model: Any, inputs: tuple[Any, ...]) -> bool:
        """Whether a forward is its own.

        Args:
            inputs: the ids and the embeddings that the forward is given.
        """
        if model is not self.model:
            return False
        made = [each() for each in self.made]
        known = any(each is not None and any(each is one for one in made) for each in inputs)
        self.tells |= known
        return known or not self.tells


under_way: ContextVar[Generation | None] = ContextVar("hawk_under_way", default=None)
"""The innermost call of generate. Each thread and each asynchronous task has its own, as of those below."""
running: ContextVar[Generation | None] = ContextVar("hawk_generation", default=None)
"""Inside a forward: the call of generate whose own it is; None where it is nobody's."""
step_options: ContextVar[dict[str, Any] | None] = ContextVar("hawk_step_options", default=None)
"""Options of torch.compile for the decode step, where generate compiles it."""


@contextlib.contextmanager
def generating(generation: Generation) -> Iterator[Generation]:
    """Let a call of generate be under way inside."""
    with holding(under_way, generation):
        yield generation


def generation_of(model: Any) -> Generation | None:
    """The call of generate of this very model that is under way, asked by what generate itself calls."""
    generation = under_way.get()
    return None if generation is None or generation.model is not model else generation


def owner_of(model: Any, inputs: tuple[Any, ...]) -> Generation | None:
    """The call of generate that a forward is of; None where others have called it."""
    generation = under_way.get()
    return None if generation is None or not generation.takes(model, inputs) else generation


@contextlib.contextmanager
def holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Let a variable hold a value inside."""
    before = variable.get()
    try:  # set within it: an interruption may come between any two instructions
        variable.set(value)
        yield
    finally:
        variable.set(before)
