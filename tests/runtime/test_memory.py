"""What was compiled for a model goes with the model, and what was compiled by settings of before with those."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from hawk_compile.capture.dynamo import compile_alone
from hawk_compile.compat import dynamo
from tests import zoo
from tests.runtime import memory
from tests.runtime.models import fresh, picture


def collect() -> None:
    """Twice: what the finalizers of a first collection let go is garbage of the next."""
    gc.collect()
    gc.collect()


def more_than(before: dict[str, int]) -> dict[str, int]:
    """Objects by kind, of kinds with more than before: others may be fewer, since caches of torch's let old ones go."""
    collect()
    return {kind: count for kind, count in memory.living().items() if count > before[kind]}


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_nothing_of_a_model_outlives_it(name: str) -> None:
    memory.cycle(zoo.build(name, layers=2), name, "eager", 0.5)
    collect()
    before, model = memory.living(), zoo.build(name, layers=2)
    for ratio in memory.RATIOS:
        memory.cycle(model, name, "eager", ratio)
    del model
    assert more_than(before) == {}


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "held", [])
    figures = {kind: [1.0, 1.0, 1.0, 1.0] for kind in (*memory.KINDS, "MiB")}
    assert memory.grown(figures) == []
    assert memory.grown({**figures, "FakeTensor": [1.0, 2.0, 3.0, 4.0]}) == ["FakeTensor"]
    assert memory.grown({**figures, "MiB": [float(each) for each in range(memory.ENOUGH)]}) == ["MiB"]


def test_nothing_that_torch_counts_of_a_compilation_outlives_it() -> None:
    """It keeps where each of its measurements was made, and what follows from each guard, without a bound."""
    edits, implications = dynamo.get_metrics_context()._edits, dynamo.ShapeEnv.get_implications.cache_info
    function = compile_alone(lambda values: values * 3 if values.shape[0] > 2 else values, backend="eager")
    with dynamo.dynamo_settings(assume_static_by_default=False):
        assert function(torch.ones(3)).tolist() == [3, 3, 3]
    assert edits and implications().currsize
    del function
    collect()
    assert (edits, implications().currsize) == ([], 0)


@pytest.mark.slow
def test_an_optimised_model_that_is_thrown_away() -> None:
    model = fresh("llava")
    model(**picture("llava"))
    runtime = model._hawk_runtime
    gone = [weakref.ref(each) for each in (model, runtime, runtime.prefill, runtime.prefill.function)]
    del model, runtime
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)


class Interrupted:
    """A backend whose first compilation is broken off."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt
        return gm.forward


@pytest.mark.slow
def test_dynamo_lets_a_function_go() -> None:
    """With its backend, its graphs, their guards and what knows their symbols; an exception in a trace included."""

    def double(values: torch.Tensor) -> torch.Tensor:
        return values * 2 + values.shape[0]

    gc.collect()
    before, held = memory.living(), len(dynamo.cached_backends)
    backend = Interrupted()
    gone = weakref.ref(backend)
    compiled = compile_alone(double, backend=backend)
    with dynamo.texts_going_with_code():
        with pytest.raises(KeyboardInterrupt):
            compiled(torch.ones(3))
        assert compiled(torch.ones(3)).tolist() == [5, 5, 5] and len(dynamo.cached_backends) == held
    assert memory.living()["FakeTensorMode"] > before["FakeTensorMode"]
    del compiled, backend
    assert more_than(before) == {} and gone() is None
