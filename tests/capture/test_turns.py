"""When a compiled function takes its turn to be captured, and when it gives it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.capture import turns
from hawk_compile.capture.dynamo import capture_lock, capture_settings
from hawk_compile.capture.turns import CompiledInTurns, ending_turn
from hawk_compile.capture.while_used import WhileUsed


class CountedLock:
    """The lock of captures, with how often it was taken and whether it is."""

    def __init__(self) -> None:
        self.taken, self.held = 0, 0

    def acquire(self) -> None:
        self.taken += 1
        self.held += 1

    def release(self) -> None:
        self.held -= 1


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> CountedLock:
    made = CountedLock()
    monkeypatch.setattr(turns, "capture_lock", made)
    return made


def as_it_is(gm: Any, example_inputs: list[Any]) -> Callable[..., Any]:
    return gm.forward


def test_each_structure_takes_one_turn_however_many_there_are(lock: CountedLock) -> None:
    """More than Dynamo's own limit of compilations, which is asked before there is a turn."""
    double = CompiledInTurns(lambda values: values * 2, backend=ending_turn(as_it_is), fullgraph=True)
    dtypes = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16)
    structures = [(dtype, (2,) * dims) for dtype in dtypes for dims in (1, 2, 3)]
    with torch._dynamo.config.patch(recompile_limit=8):
        for number, (dtype, shape) in enumerate(structures, start=1):
            for _ in range(2):
                assert double(torch.ones(shape, dtype=dtype)).equal(torch.full(shape, 2, dtype=dtype))
            assert lock.taken == number
    assert not lock.held


def test_whatever_sends_a_known_call_to_be_captured_takes_a_turn(lock: CountedLock) -> None:
    """Inputs of one structure; what changes is the thread's mode, the weights, the modules, or Dynamo's memory."""
    layer, values = nn.Sequential(nn.Linear(2, 2)), torch.ones(2)
    apply = CompiledInTurns(lambda values: layer(values).float(), backend=ending_turn(as_it_is), fullgraph=True)

    def check(mode: Any) -> None:
        before = lock.taken
        for _ in range(2):
            with mode:
                assert apply(values).equal(layer(values).float())
            assert lock.taken == before + 1
        assert not lock.held

    check(contextlib.nullcontext())
    check(torch.no_grad())
    check(torch.autocast("cpu", torch.bfloat16))
    layer[0] = nn.Sequential(layer[0])
    check(contextlib.nullcontext())
    layer.requires_grad_(False)
    check(contextlib.nullcontext())
    torch._dynamo.reset()
    check(contextlib.nullcontext())


@pytest.mark.parametrize("early", [True, False])
def test_a_turn_ends_where_the_graph_runs_or_with_the_call(lock: CountedLock, early: bool) -> None:
    held = []

    def compiler(gm: Any, example_inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            held.append(lock.held)
            return gm.forward(*args)

        return run

    double = CompiledInTurns(lambda values: values * 2, backend=ending_turn(compiler) if early else compiler)
    double(torch.ones(2))
    double(torch.ones(2))
    assert held == [0 if early else 1, 0] and not lock.held


def test_a_graph_that_breaks_runs_once(lock: CountedLock) -> None:
    """The turn is taken before anything has run: a step that was begun twice would fill its cache twice."""
    filled: list[int] = []

    def step(values: Tensor) -> Tensor:
        values = values + 1
        torch._dynamo.graph_break()
        filled.append(values.ndim)
        return values * 2

    compiled = CompiledInTurns(step, backend=ending_turn(as_it_is))
    for number, values in enumerate((torch.ones(2), torch.ones(2, 2), torch.ones(3, 2), torch.ones(2).double()), 1):
        assert compiled(values).equal((values + 1) * 2)
        assert len(filled) == number
    assert lock.taken == 3 and not lock.held


def test_a_capture_that_fails_gives_its_turn_back(lock: CountedLock) -> None:
    def branches(values: Tensor) -> Tensor:
        return values * 2 if values.sum() > 0 else values

    function = CompiledInTurns(branches, backend=ending_turn(as_it_is), fullgraph=True)
    for _ in range(2):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            function(torch.ones(2))
    assert lock.taken == 2 and not lock.held


def test_without_dynamo_no_turn_is_taken(lock: CountedLock) -> None:
    double = CompiledInTurns(lambda values: values * 2, backend=ending_turn(as_it_is), fullgraph=True)
    with torch.compiler.set_stance("force_eager"):
        assert double(torch.ones(2)).equal(torch.full((2,), 2.0))
    assert not lock.taken


def test_what_a_collected_model_needed_is_put_back_behind_a_capture() -> None:
    """Code that changes in the middle of a capture would be guarded by halves."""

    class Noted(WhileUsed):
        changed = False

        def change(self) -> None:
            self.changed = True

        def undo(self) -> None:
            self.changed = False

    class User:
        pass

    noted, user, other = Noted(), User(), User()
    noted.begin(user)
    with capture_lock, capture_settings():
        del user
        assert noted.changed
    noted.begin(other)
    noted.end(other)
    assert not noted.changed
    last = User()
    noted.begin(last)
    del last
    assert not noted.changed
