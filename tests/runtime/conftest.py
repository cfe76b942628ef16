"""The order of these tests: all of one model together, so that its captured graphs serve them all in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[place] for place in places), key=model_of)
    for place, item in zip(places, ours, strict=True):
        items[place] = item


def model_of(item: pytest.Item) -> str:
    """The architecture a test is about, "" where the test names it itself."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("name", "")) if callspec else ""
