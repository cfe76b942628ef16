"""The faults of `tests.runtime.load` count what they threw, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hawk_compile.errors import HawkError
from tests.runtime.load import faults, points
from tests.runtime.load.calls import Answer, Call
from tests.runtime.load.faults import FAULTS, at
from tests.runtime.models import picture, pruned


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_contradicts_itself_is_said_by_an_error_of_ours(name: str) -> None:
    """Every wrong call of `refused`."""
    inputs = picture(name)
    for wrong in faults.wrong_arguments(inputs):
        with torch.no_grad(), pytest.raises(HawkError, match=next(iter(wrong)) + "|attention_mask"):
            pruned(name)(**inputs | wrong)


def test_an_error_other_than_the_one_that_was_thrown_is_seen() -> None:
    """Of the same class too: nothing else that goes wrong may pass for the fault."""
    thrown, other = RuntimeError(points.told_at("graph")), RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    wrapped = HawkError("...")
    wrapped.__cause__ = thrown
    assert faults.seen(thrown, RuntimeError, "in graph") == faults.seen(wrapped, RuntimeError, "in graph") == "came"
    for error, wanted in ((other, RuntimeError), (thrown, KeyboardInterrupt)):
        with pytest.raises(RuntimeError):
            faults.seen(error, wanted, "in graph")
    with pytest.raises(RuntimeError, match="mat1"):
        at("graph")(None, Call("", {}, raising(other)), random.Random(0))


def raising(error: Exception) -> Callable[..., Answer]:
    def call(*_: Any) -> Answer:
        raise error

    return call


def test_the_names_of_faults_are_their_own() -> None:
    names = [fault.__name__ for fault in FAULTS]  # type: ignore[attr-defined]
    assert len({*names}) == len(names) and at("graph").__name__ == "graph"  # type: ignore[attr-defined]
