"""How far a call is that takes a while: `progress=` of `export`, `evaluate`, `calibrate`, `bench` and `show`.

    hawk_compile.evaluate(..., progress=lambda now: print(f"{now.done} of {now.total} {now.text}"))
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a call tells while it runs.

    Attributes:
        done, total: of what the call counts (answers, questions, components, stages); 0 and 0 before it is counted.
        text: in a line, what begins, is done or is left out; "" where the numbers say it.
    """

    done: int
    total: int
    text: str = ""


Listener = Callable[[Progress], None]


def nobody(now: Progress) -> None:
    """Listens where nobody else does."""
