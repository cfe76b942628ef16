"""Functions that are compiled alone: each has its graphs and its limit, whatever the others and other threads do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_isolate_recompiles_id

from hawk_compile.capture.dynamo import compile_alone


class Counted:
    """A backend that keeps what it is given, and notes at each run what torch holds for the whole process."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self.numbers: list[int] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)

        def run(*args: Any) -> Any:
            self.numbers.append(get_eval_frame_isolate_recompiles_id())
            return gm(*args)

        return run


def scaled(x: Tensor, factor: int, *, shift: int = 1) -> Tensor:
    return x * factor + shift


class Scaled:
    def scaled(self, x: Tensor, factor: int, *, shift: int = 1) -> Tensor:
        return x * factor + shift


def test_each_has_its_graphs_and_its_limit() -> None:
    for function in (scaled, Scaled().scaled):
        backends = [Counted(), Counted()]
        alone = [compile_alone(function, backend=backend, recompile_limit=2, fullgraph=True) for backend in backends]
        for rank in (1, 2):  # as many graphs as the limit allows, twice
            x = torch.arange(3.0).reshape((1,) * (rank - 1) + (3,))
            for compiled in alone:
                assert torch.equal(compiled(x, 2, shift=3), x * 2 + 3)
        assert [len(backend.graphs) for backend in backends] == [2, 2]


def test_what_torch_holds_for_the_whole_process_stays_as_it_is() -> None:
    """A call that ends in one thread would change it for one that begins in another, which is then compiled again."""
    backend, before = Counted(), get_eval_frame_isolate_recompiles_id()
    compile_alone(scaled, backend=backend, fullgraph=True)(torch.ones(3), 2)
    assert backend.numbers == [before]
