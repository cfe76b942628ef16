"""What is asked of a model before its graphs run: the same as Dynamo asks, but all at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from hawk_compile.capture import states
from hawk_compile.capture.states import CompiledByState, State
from hawk_compile.compat.guards import Guard, place_of


class Block(nn.Module):
    """With every kind of thing that a graph takes from a module."""

    kind = "plain"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.5)
        self.scale, self.eps, self.name = 2.0, 1e-6, "block"
        self.register_buffer("shift", torch.ones(width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.drop(self.linear(self.norm(values))) * self.scale + self.shift
        if self.name != "block" or self.kind != "plain":
            values = values + 1
        return values * 3 if hasattr(self, "gate") else values


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.embed(values)
        for layer in self.layers:
            values = layer(values)
        return self.head(values)


def run(forward: Callable[..., Any], values: torch.Tensor) -> Any:
    return forward(values)


def kept(gm: torch.fx.GraphModule, _: Any) -> Any:
    return gm.forward


class Counted:
    """A model and its function compiled by state, with graphs counted."""

    def __init__(self, layers: int = 3) -> None:
        torch.manual_seed(0)
        self.model, self.graphs = Model(layers).eval(), 0
        self.by_state = CompiledByState(run, backend=self.compile, fullgraph=True)

    def compile(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return gm.forward

    def __call__(self, rows: int = 3) -> None:
        """A call, which must be the model's own."""
        values = torch.linspace(-1, 1, 4 * rows, dtype=self.model.head.weight.dtype).view(rows, 4)
        with torch.no_grad():
            torch.manual_seed(1)
            found = self.by_state.call(lambda: None, self.model.forward, values)
            torch.manual_seed(1)
            torch.testing.assert_close(found, self.model(values), rtol=0, atol=1e-6)


def layer(model: Model) -> Any:
    return model.layers[1]


def hook(model: Model) -> None:
    layer(model).linear.register_forward_hook(lambda module, args, output: output * 5)


def hook_before(model: Model) -> None:
    layer(model).register_forward_pre_hook(lambda module, args: (args[0] * 5,))


def hook_in_a_new_place(model: Model) -> None:
    layer(model).linear._forward_hooks = OrderedDict()
    hook(model)


def replaced(model: Model) -> None:
    layer(model).linear = nn.Sequential(nn.Linear(4, 4))


def own_forward(model: Model) -> None:
    layer(model).norm.forward = lambda values: values * 7


def other_layer_class(model: Model) -> None:
    class Other(Block):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return super().forward(values) * 2

    layer(model).__class__ = Other


def untied(model: Model) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach() * 2)


def bias_added(model: Model) -> None:
    layer(model).linear.bias = nn.Parameter(torch.ones(4))


CHANGES: dict[str, Callable[[Model], Any]] = {
    "hook": hook,
    "hook_before": hook_before,
    "hook_in_a_new_place": hook_in_a_new_place,
    "train": lambda model: model.train(),
    "train_of_a_part": lambda model: layer(model).drop.train(),
    "number": lambda model: setattr(layer(model), "scale", 3.0),
    "number_of_another_class": lambda model: setattr(layer(model), "scale", 2),
    "text": lambda model: setattr(layer(model), "name", "other"),
    "attribute_over_its_class": lambda model: setattr(layer(model), "kind", "other"),
    "attribute_that_was_not": lambda model: setattr(layer(model), "gate", 1),
    "buffer_that_was_not": lambda model: layer(model).register_buffer("gate", torch.ones(1)),
    "dtype": lambda model: model.double(),
    "dtype_and_back": lambda model: model.double().float(),
    "requires_grad": lambda model: layer(model).linear.weight.requires_grad_(False),
    "replaced": replaced,
    "own_forward": own_forward,
    "other_layer_class": other_layer_class,
    "untied": untied,
    "bias_added": bias_added,
    "buffer": lambda model: setattr(layer(model), "shift", torch.ones(1)),
    "fewer_layers": lambda model: model.layers.__delitem__(2),
    "in_another_order": lambda model: setattr(model, "layers", nn.ModuleList([model.layers[2], *model.layers[:2]])),
}
SAME = {"dtype_and_back", "in_another_order"}
"""What leaves the model as it was, as far as a graph knows it: its weights are inputs."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_in_another_state(change: str) -> None:
    """And in its own again, without a graph, where it was not changed."""
    counted = Counted()
    counted()
    counted()
    assert (counted.graphs, len(counted.by_state.states)) == (1, 1)
    CHANGES[change](counted.model)
    assert counted.by_state.states[0].is_of(counted.model) == (change in SAME)
    counted()
    assert len(counted.by_state.states) == 1 + (change not in SAME)
    counted()
    assert counted.graphs == 1 + (change not in SAME)


def test_a_state_that_comes_back_is_known() -> None:
    counted = Counted()
    for _ in range(2):
        counted()
        handle = layer(counted.model).register_forward_hook(lambda module, args, output: output * 5)
        counted()
        handle.remove()
        counted.model.train()
        counted()
        counted.model.eval()
    assert (counted.graphs, len(counted.by_state.states)) == (3, 3)


def test_weights_of_other_values_and_places_are_the_same_state() -> None:
    """As a merge, an optimiser's step or an offloaded weight leaves them."""
    counted = Counted()
    counted()
    linear = layer(counted.model).linear
    linear.weight.data.mul_(2)
    counted()
    linear.weight = nn.Parameter(linear.weight.detach() + 1)
    counted()
    layer(counted.model).linear, other = nn.Linear(4, 4, bias=False), linear
    counted()
    assert other is not layer(counted.model).linear
    assert (counted.graphs, len(counted.by_state.states)) == (1, 1)


def test_graphs_of_one_state_are_asked_of_together() -> None:
    counted = Counted()
    counted(3)
    counted(1)
    assert (counted.graphs, len(counted.by_state.states)) == (2, 1)
    hook(counted.model)
    counted(3)
    counted(1)
    assert (counted.graphs, len(counted.by_state.states)) == (4, 2)


def left_with(layers: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places that Dynamo asks itself, of a model of so many layers."""
    places: list[str] = []
    take = State.take

    def noted(self: State, guards: list[Guard]) -> list[bool]:
        left = take(self, guards)
        places[:] = [place_of(guard) for guard, stays in zip(guards, left, strict=True) if stays]
        return left

    with monkeypatch.context() as patched:
        patched.setattr(State, "take", noted)
        Counted(layers)()
    return places


def test_what_dynamo_asks_itself_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (left_with(layers, monkeypatch) for layers in (2, 6))
    assert few
    assert len(few) == len(many)


def test_a_model_that_changes_while_it_is_captured_leaves_no_graph_of_its_state() -> None:
    """What another thread does between the question and the capture."""
    counted = Counted()
    counted(3)

    def change() -> None:
        layer(counted.model).scale = 5.0

    values = torch.ones(1, 4)
    state = counted.by_state.states[0]
    with torch.no_grad():
        found = state.compiled.call(change, counted.model.forward, values)
        torch.testing.assert_close(found, counted.model(values))
    assert counted.graphs == 2
    counted(3)
    counted(1)
    layer(counted.model).scale = 2.0
    counted(3)
    counted(1)


def test_threads_that_come_first_share_a_state() -> None:
    counted = Counted()
    counted()
    hook(counted.model)
    with ThreadPoolExecutor(8) as pool:
        made = {*pool.map(lambda _: counted.by_state.state_of(counted.model), range(64))}
    assert len(made) == 1
    assert len(counted.by_state.states) == 2


def test_no_more_states_are_kept_than_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a number that changes at each call the user is told."""
    monkeypatch.setattr(states, "MOST", 3)
    counted = Counted(1)
    for scale in (1.0, 2.0, 3.0, 4.0, 4.0, 5.0):
        counted.model.layers[0].scale = scale
        counted()
    assert (counted.graphs, len(counted.by_state.states)) == (5, 3)
    assert caplog.text.count("more than 3 states") == 2


def test_a_method_of_no_module_is_compiled_all_the_same() -> None:
    by_state = CompiledByState(run, backend=kept, fullgraph=True)
    assert by_state.call(lambda: None, torch.neg, torch.ones(2)).tolist() == [-1, -1]
