"""One call of `generate`: what lasts from one of its steps to the next where no cache carries it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hawk_compile.runtime.asked import AskedQuestion
from hawk_compile.runtime.records import PrefillRecord


@dataclass
class Generation:
    """A call of generate that is under way in this thread or task.

    Attributes:
        prompt_length: where every step prefills anew (`use_cache=False`): the ids of the prompt. What stands behind
            them was generated and has no vote.
        record: what the prefill of the prompt did.
        question: what this call says of who votes.
        step_options: options of torch.compile for the decode step, where generate compiles it.
        begun: whether a forward of it has run: a single token behind that is one that the model has chosen.
        inputs: its arguments by name.
        repeats: whether its next forward is given the whole conversation, which its cache holds but for the end.
    """

    prompt_length: int | None = None
    record: PrefillRecord | None = None
    question: AskedQuestion | None = None
    step_options: dict[str, Any] | None = None
    begun: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    repeats: bool = False


running: ContextVar[Generation | None] = ContextVar("hawk_generation", default=None)
"""Each thread and each asynchronous task has its own."""


@contextlib.contextmanager
def generating(generation: Generation) -> Iterator[Generation]:
    """Let the forwards that are called inside belong to this call of generate."""
    before = running.get()
    try:  # set within it: an interruption may come between any two instructions
        running.set(generation)
        yield generation
    finally:
        running.set(before)
