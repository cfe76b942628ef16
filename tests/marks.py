"""Cases that `make test` leaves to `make test-slow`."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Cases of a parametrised test, each marked slow."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]
