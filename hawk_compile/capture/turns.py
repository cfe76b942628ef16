"""Who waits for whom: only captures take turns, what is captured already runs side by side.

Dynamo's settings are each thread's own (`torch._dynamo.config.patch`), and Dynamo compiles one function at a time. What
the lock guards is the code of the models, which an export changes for the whole process while it traces: a call that
has to be captured waits for it. It is let go where the graph begins to run, in the very call that captured it.

Whether a call has to be captured only Dynamo's guards know: of its inputs, but also of autocast, of the weights'
dtypes, of adapters, of `torch._dynamo.reset`, of code that an export has changed. So every call is begun without the
lock. Where Dynamo begins to trace, which is before anything has run, the trace is ended at once; the call then takes
the lock and is begun again. The lock may not be taken in the middle of a trace: Dynamo holds its own there, which an
export waits for while it holds this one.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from torch import fx

from hawk_compile.capture.dynamo import UNCUT, capture_lock, capture_settings, compile_alone
from hawk_compile.compat.dynamo import dynamo_settings, is_compiled, is_in_ddp, while_traced
from hawk_compile.compat.guards import GUARD_FILTER

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

turn = threading.local()
"""`taken`: whether this thread's call has the lock, to capture."""


class TurnNeeded(BaseException):
    """Ends a trace in a thread that has not taken its turn. Of an Exception, Dynamo would make an error of its own."""


def ask_for_turn(context: Any) -> None:
    if not getattr(turn, "taken", False):
        raise TurnNeeded


def end_turn() -> None:
    """Let other threads capture, if it is this one's turn.

    Of an interruption (Ctrl-C may come between any two instructions) no order of these two lines is safe but this one:
    a turn that is over may be ended once more, a lock that nobody gives back stays taken.
    """
    if getattr(turn, "taken", False):
        with contextlib.suppress(RuntimeError):  # of a lock that this thread does not have, or not yet
            capture_lock.release()
        turn.taken = False


def nothing() -> None:
    """Nothing to look at before a capture."""


class CompiledInTurns:
    """A function that Dynamo compiles, one structure of its calls after another.

    Where the graph of a call breaks (only a decode step's may), what lies behind the break is captured without a turn.
    """

    def __init__(
        self, function: Callable[..., Any], guards: Callable[..., list[bool]] | None = None, **settings: Any
    ) -> None:
        """
        Args:
            guards: which of a graph's guards Dynamo asks; None: all. Dynamo holds it, as it does a backend.
            settings: of `torch.compile`. A backend that is wrapped by `ending_turn` lets other threads capture as soon
                as the graph runs, another one when the call is over.
        """

        def begun(*args: Any, **kwargs: Any) -> Any:
            while_traced(ask_for_turn)
            return function(*args, **kwargs)

        begun.__name__ = getattr(function, "__name__", type(function).__name__)
        self.begun, self.guards, self.settings = begun, guards, settings
        self.function = self.compiled()

    def compiled(self) -> Callable[..., Any]:
        options = {} if self.guards is None else {"options": {GUARD_FILTER: self.guards}}
        return compile_alone(self.begun, **options, **self.settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(nothing, *args, **kwargs)

    def call(self, before_capture: Callable[[], None], /, *args: Any, **kwargs: Any) -> Any:
        """One call.

        Args:
            before_capture: called where no graph serves the call, and before one is captured. What it raises ends the
                call.
        """
        if not is_compiled(self.function):  # torch.compile was switched off when this was made
            self.function = self.compiled()
        with contextlib.suppress(TurnNeeded), dynamo_settings(**UNCUT) if is_in_ddp() else contextlib.nullcontext():
            return self.function(*args, **kwargs)
        try:
            turn.taken = True
            capture_lock.acquire()
            before_capture()
            with capture_settings():
                return self.function(*args, **kwargs)
        finally:
            end_turn()


def ending_turn(compiler: Compiler) -> Compiler:
    """A compiler of Dynamo's graphs that end the turn they were captured in when they begin to run."""

    def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled = compiler(gm, example_inputs)

        def run(*args: Any) -> Any:
            end_turn()
            return compiled(*args)

        return run

    return compile_graph
