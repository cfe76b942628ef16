"""What `tests.serving.load` says of a server's memory."""

from __future__ import annotations

import math

import pytest

from tests.serving.load import ENOUGH, GROWTH, growth, overgrown

COUNT = 200


def measured(more: float, begin: float = 0.0) -> list[dict[str, float]]:
    """A process that fills its caches in the first half, grows by `more` in the second, and is never at rest; one that
    stays as it is; and one that ends early."""
    made = []
    for number in range(COUNT):
        late = max(0.0, 2 * number / COUNT - 1)
        size = 700 + 60 * min(1.0, 2 * number / COUNT) + more * late + 3 * math.sin(number)
        short = {"g++ 3": 100.0} if number < COUNT // 5 else {}
        made.append({"server 1": size, **({"worker 2": 900.0} if number >= begin * COUNT else {}), **short})
    return made


@pytest.mark.parametrize(("more", "wrong"), [(0.0, []), (1.8 * GROWTH, ["server 1"]), (-20.0, [])])
def test_a_process_that_grows(more: float, wrong: list[str]) -> None:
    assert overgrown(measured(more), ENOUGH) == wrong
    assert not overgrown(measured(more), ENOUGH - 1), "caches still fill"
    assert growth(measured(more))["g++ 3"] == 0


def test_a_process_that_comes_late_is_growth() -> None:
    assert overgrown(measured(0.0, begin=0.8), ENOUGH) == ["worker 2"]
