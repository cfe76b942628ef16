"""Graphs that were loaded: which calls they serve, and how they are run there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.compat.models import BUFFERS, PARAMETERS
from hawk_compile.exporting.schema import Misfit
from hawk_compile.saved.calls import Build, NotSaved, described
from hawk_compile.saved.sizes import Written, serves
from hawk_compile.saved.unchanged import Unchanged

Run = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Served:
    """A graph that was loaded; see `hawk_compile.saved.graph.Graph` for what its parts are.

    Attributes:
        inputs: of each input, the place of one of the call's tensors; or where a weight lies, and its name there.
    """

    run: Run
    inputs: list[int | tuple[dict[str, Any], str]]
    call: Any
    shapes: list[list[Written]]
    symbols: dict[str, tuple[int, int]]
    ranges: dict[str, tuple[int | None, int | None]]
    conditions: list[Written]
    build: Build

    def called(self, tensors: Sequence[Tensor], cache: Any) -> Any:
        given = [
            tensors[source].contiguous() if isinstance(source, int) else source[0][source[1]] for source in self.inputs
        ]
        return self.build(tensors, self.run(given), cache)[:-1]


class SavedPrefill:
    """What `CompiledPrefill` asks before it compiles.

    Attributes:
        answered: how many calls were served.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], graphs: Sequence[Served]) -> None:
        self.forward, self.graphs = forward, graphs
        self.unchanged = Unchanged(model)
        self.answered = 0

    def answer(
        self, forward: Callable[..., Any], inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...],
        along: tuple[str, ...],
    ) -> tuple[Any, ...] | None:  # fmt: skip
        """As `planned_forward`; None where no graph serves the call, or the model is not what it was."""
        tensors: list[Tensor] = []
        try:
            call = described([inputs, past_mask, planned, along], tensors)
        except NotSaved:
            return None
        alike = [graph for graph in self.graphs if graph.call == call]
        graph = next((each for each in alike if serves(each, tensors)), None)
        if graph is None or forward != self.forward or not self.unchanged.still():
            return None
        self.answered += 1
        return tuple(graph.called(tensors, inputs["past_key_values"]))


def place_of_weight(model: PreTrainedModel, path: str) -> tuple[dict[str, Any], str]:
    """Where a weight is read from at each call.

    Raises:
        Misfit: the model has none of that name.
    """
    parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        raise Misfit(f"the model has no {path[:80]}") from None
    for container in (PARAMETERS, BUFFERS):
        if getattr(module, container).get(name) is not None:
            return getattr(module, container), name
    raise Misfit(f"the model has no {path[:80]}")
