"""The tiny models of tests/architectures."""

from __future__ import annotations

from pathlib import Path

from hawk_compile.tools.survey.tiny import Tiny, read

FOLDER = Path(__file__).parent / "architectures"


def tiny(name: str) -> Tiny:
    return read(FOLDER / f"{name}.json")
