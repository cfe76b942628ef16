"""Equal layers as calls of one graph: what is computed stays, and what cannot be called so is left as it is."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hawk_compile
from hawk_compile.compile.pipeline import PassOptions, run_passes
from hawk_compile.passes.fold_layers import fold_layers
from hawk_compile.passes.graph import is_call
from hawk_compile.settings.budgets import Adaptive
from tests import zoo
from tests.passes import graphs
from tests.rounded import round_weights

LAYERS = 5


class Decoder(graphs.Decoder):
    """LAYERS attentions more, each with `between` in front of it."""

    def __init__(self, between, widths=(graphs.WIDTH,) * LAYERS):
        super().__init__()
        self.between = between
        self.up = nn.ModuleList(nn.Linear(graphs.WIDTH, width) for width in widths)
        self.down = nn.ModuleList(nn.Linear(width, graphs.WIDTH) for width in widths)

    def forward(self, *inputs):
        hidden, kept = super().forward(*inputs), []
        for layer, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            hidden = hidden + down(self.between(up(hidden), layer, kept))
            hidden = F.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
        return hidden, kept


def gelu(hidden, layer, kept):
    return F.gelu(hidden)


def calls_of(gm):
    return [node.args[1] for node in gm.graph.nodes if is_call(node, "invoke_subgraph")]


def folded(decoder):
    inputs = graphs.prompt()
    gm = graphs.captured(graphs.planned(decoder), inputs, graphs.plan_of(inputs, 2))
    with torch.no_grad():
        return run_passes(gm, [], PassOptions())


def test_equal_layers_become_one_graph():
    """But for the first, which starts behind an attention of another kind."""
    gm = folded(Decoder(gelu))
    assert calls_of(gm) == ["hawk_layer_0"] * (LAYERS - 1)
    assert sum(is_call(node, "scaled_dot_product_attention") for node in gm.graph.nodes) == 2
    assert sum(is_call(node, "gelu") for node in gm.hawk_layer_0.graph.nodes) == 1
    once = gm.graph.python_code("self").src
    with torch.no_grad():
        assert fold_layers(gm, []).graph.python_code("self").src == once


def test_layers_of_two_kinds_become_two_graphs():
    widths = [graphs.WIDTH, 2 * graphs.WIDTH] * LAYERS
    assert calls_of(folded(Decoder(gelu, widths[:LAYERS]))) == ["hawk_layer_0", "hawk_layer_1"] * 2
    assert calls_of(folded(Decoder(lambda hidden, layer, kept: hidden * (layer + 1)))) == []


def returns_a_view(hidden, layer, kept):
    kept += [hidden, hidden[..., :2]]
    return hidden


CALLS = torch.zeros(1)


def writes_into_an_input_of_the_graph(hidden, layer, kept):
    CALLS.add_(1)
    return hidden


@pytest.mark.parametrize("between", [returns_a_view, writes_into_an_input_of_the_graph])
def test_what_cannot_be_called_stays(between):
    assert calls_of(folded(Decoder(between))) == []


def test_layers_with_weights_that_are_no_plain_tensors_stay():
    """And are no reason to leave plain ones as they are, which look the same."""
    decoder = Decoder(gelu)
    round_weights(decoder.up[:2])
    assert calls_of(folded(decoder)) == ["hawk_layer_0"] * (LAYERS - 2)
    round_weights(decoder.up[2:])
    assert calls_of(folded(decoder)) == []


def in_place(hidden, layer, kept):
    return hidden.mul_(2)


def into_an_earlier_layer(hidden, layer, kept):
    return F.relu(kept[0], inplace=True) + hidden if kept else kept.append(hidden) or hidden


@pytest.mark.parametrize("between", [pytest.param(in_place, marks=pytest.mark.slow), into_an_earlier_layer])
def test_writes_in_place_are_values_and_no_obstacle(between, monkeypatch):
    decoder, inputs = Decoder(between), graphs.prompt()
    assert len(calls_of(folded(decoder))) > 1
    options = {"ratio": 0.6, "backend": "eager"}
    with torch.no_grad():
        hidden, kept = torch.compile(decoder, backend="hawk", options=options, dynamic=True)(*inputs)
        monkeypatch.setenv("HAWK_DISABLE", "fold_layers")
        torch._dynamo.reset()
        expected = torch.compile(decoder, backend="hawk", options=options, dynamic=True)(*inputs)
    assert torch.equal(hidden, expected[0]) and all(map(torch.equal, kept, expected[1]))


@pytest.mark.parametrize("widths", [pytest.param((16,) * LAYERS, marks=pytest.mark.slow), (16, 32) * 2])
def test_what_is_computed_stays(widths, monkeypatch):
    """Bit for bit, with layers of one kind and of two."""
    decoder, results = Decoder(gelu, widths), []
    for left_out in ("", "fold_layers"):
        monkeypatch.setenv("HAWK_DISABLE", left_out)
        settings = {"options": {"ratio": 0.6, "backend": "eager"}, "dynamic": True, "isolate_recompiles": True}
        with torch.no_grad():
            results.append(torch.compile(decoder, backend="hawk", **settings)(*graphs.prompt())[0])
    assert results[0].shape[1] < graphs.prompt()[0].shape[1]
    assert torch.equal(*results)


@pytest.mark.slow
def test_with_gradients_all_weights_get_theirs():
    """Also where equal layers differ in what is trained, which calls of one graph would share."""
    decoder = Decoder(gelu).requires_grad_(False)
    trained = [layer.weight.requires_grad_() for layer in decoder.up[3:]]
    pruned = torch.compile(decoder, backend="hawk", options={"ratio": 0.6, "backend": "aot_eager"}, dynamic=True)
    pruned(*graphs.prompt())[0].sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained)


def results(model, name, rows):
    inputs = zoo.inputs(name, model, rows=[zoo.sizes(name)[place] for place in rows])
    with torch.no_grad():
        out = model(**inputs)
    return [out.logits, *(part for layer in out.past_key_values.layers for part in (layer.keys, layer.values))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])  # layers that add features; two kinds of attention
def test_nothing_changes(name, monkeypatch):
    """Bit for bit, in a padded batch."""
    model = hawk_compile.optimize(zoo.build(name, layers=5), ratio=0.6, backend="eager")
    found = results(model, name, (4, 1))
    monkeypatch.setenv("HAWK_DISABLE", "fold_layers")
    twin = hawk_compile.optimize(zoo.build(name, layers=5), ratio=0.6, backend="eager")
    expected = results(twin, name, (4, 1))
    assert len(found) == 1 + 2 * 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_layers_of_a_length_that_the_graph_finds_stay(caplog):
    model = hawk_compile.optimize(zoo.build("llava", layers=4), ratio=0, budget=Adaptive(0.6), backend="eager")
    with caplog.at_level(logging.INFO, logger="hawk_compile"):
        results(model, "llava", (4,))
    before, after = re.search(r"fold_layers: (\d+) -> (\d+) nodes", caplog.text).groups()
    assert before == after


@pytest.mark.slow
def test_through_inductor():
    model = hawk_compile.optimize(zoo.build("llava", layers=4), ratio=0.6)
    eager = hawk_compile.optimize(zoo.build("llava", layers=4), ratio=0.6, backend="eager")
    for one, other in zip(results(model, "llava", (4,)), results(eager, "llava", (4,)), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
