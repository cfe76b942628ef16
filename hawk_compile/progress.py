"""How far a call is that takes a while: `progress=` of `export`, `evaluate`, `calibrate`, `bench` and `show`.

    hawk_compile.evaluate(..., progress=lambda now: print(f"{now.done} of {now.total} {now.text}"))
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a call tells while it runs.

    Attributes:
        done: how many of what the call counts: answers, questions, heads, stages, components.
        total: how many there are; 0 where that is not known, or not yet.
        text: in a line, what begins, is done or is left out; "" where the numbers say it.
    """

    done: int
    total: int
    text: str = ""


Listener = Callable[[Progress], None]


def nobody(now: Progress) -> None:
    """Listens where nobody else does."""
