"""A function of a model that is compiled for one state of the model after another.

    state 0   eval, bf16, no adapter      graphs for one row, for a batch, for padding, ...
    state 1   with an adapter             ...

What a graph takes from the model it asks of the model before it runs. Most of that is the same for all graphs of a
state, and is asked once for all of them (`conditions.py`, `at_once.py`); Dynamo asks what is left, of the arguments
above all. A model that is in no known state any more is in a new one, for which its graphs are captured anew.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from hawk_compile.capture.at_once import Asked
from hawk_compile.capture.conditions import Conditions
from hawk_compile.capture.dynamo import without_holding
from hawk_compile.capture.turns import CompiledInTurns
from hawk_compile.compat.guards import OWNER, Guard, place_of

log = logging.getLogger("hawk_compile")

MOST = 16
"""States whose graphs are kept; of more, the oldest go."""


class State:
    """One state of a model, known by the graphs that were captured in it, and the function compiled for it."""

    def __init__(self, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        self.conditions = Conditions()
        self.asked: Asked | None = None
        """None until there is a graph."""
        self.compiled = CompiledInTurns(function, guards=without_holding(self.take), **settings)

    def take(self, guards: Sequence[Guard]) -> list[bool]:
        """Which conditions of a new graph Dynamo is to ask itself."""
        model = next((guard.value for guard in guards if place_of(guard) == OWNER), None)
        if not isinstance(model, nn.Module) or not self.is_of(model):  # changed, by another thread, since it was asked
            return [True] * len(guards)
        left = self.conditions.take(model, guards)
        self.asked = Asked(self.conditions, model)
        return left

    def is_of(self, model: nn.Module | None) -> bool:
        """Whether the model is in this state, but for what Dynamo asks."""
        return self.asked is None or (model is not None and self.asked.hold(model))


class CompiledByState:
    """A function whose first argument is a method of the model, as `CompiledInTurns` compiles it, state by state."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        self.function, self.settings = function, settings
        self.lock = threading.Lock()
        """Guards additions to `states`, which is never changed in place."""
        self.states: tuple[State, ...] = ()

    def call(self, before_capture: Callable[[], None], method: Callable[..., Any], /, *args: Any) -> Any:
        """As `CompiledInTurns.call`."""
        owner = getattr(method, "__self__", None)
        state = self.state_of(owner if isinstance(owner, nn.Module) else None)
        return state.compiled.call(before_capture, method, *args)

    def state_of(self, model: nn.Module | None) -> State:
        states = self.states
        if (state := holding(states, model)) is not None:
            return state
        with self.lock:
            state = holding(self.states[len(states) :], model) if len(self.states) > len(states) else None
            if state is None:
                state = State(self.function, self.settings)
                if len(self.states) == MOST:
                    log.warning(
                        "the model has been in more than %d states, and graphs of the oldest go: where a number or a "
                        "switch of a module changes at each call, each call is compiled anew",
                        MOST,
                    )
                self.states = (*self.states[-MOST + 1 :], state)
            return state


def holding(states: tuple[State, ...], model: nn.Module | None) -> State | None:
    """The first of some states that a model is in."""
    return next((state for state in states if state.is_of(model)), None)
