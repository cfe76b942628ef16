"""The passes that only exports need, on torch.export's graph of a small prefill."""

import pytest
import torch
from torch import nn

from hawk_compile.compile.pipeline import EXPORT_PASSES, PORTABLE_PASSES, PassOptions, run_passes
from hawk_compile.passes.graph import op_name
from hawk_compile.passes.inline_operators import inline_operators
from hawk_compile.passes.remove_assertions import remove_assertions
from hawk_compile.passes.replace_masked_scatter import replace_masked_scatter
from tests.passes import graphs


class Planned(nn.Module):
    """The small decoder with a plan beside it, as an exported prefill has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, plan):
        return graphs.planned(self.model)(inputs, plan)


def exported(model=None, rows=2):
    """(graph of torch.export, arguments)."""
    inputs = graphs.prompt(rows=rows)
    arguments = (inputs, graphs.plan_of(inputs, 2))
    free = torch.export.Dim.DYNAMIC
    shapes = (
        ({0: free, 1: free}, {0: free}, {0: free, 1: free}, {0: free, 1: free}),
        ({0: free, 1: free}, {0: free}, None, {0: free}, {0: free}),
    )
    program = torch.export.export(Planned(model or graphs.Decoder()), arguments, dynamic_shapes=shapes, strict=False)
    return program.module(), arguments


def ops(gm):
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


def test_checks_are_removed_and_writes_in_place_stay():
    class Writes(nn.Module):
        def forward(self, x):
            torch._check(x.shape[0] < 99)
            out = x.to(torch.float64).clone()
            out[:, 1:3] = 2.0
            return out

    x = torch.randn(4, 5)
    program = torch.export.export(Writes(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    gm = program.module()
    assert any(name.startswith("_assert") for name in ops(gm)) or any(n.op == "call_module" for n in gm.graph.nodes)
    expected = gm(x)
    gm = remove_assertions(gm, [])
    gm.recompile()
    assert not any(name.startswith("_assert") for name in ops(gm))
    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    assert torch.equal(gm(x), expected) and (expected[:, 1:3] == 2).all()
    before = len(gm.graph.nodes)
    assert len(remove_assertions(gm, []).graph.nodes) == before


@pytest.mark.parametrize("selection", ["sort", "threshold"])
def test_a_portable_prefill_equals_the_compiled_one(selection):
    """The same model, plan and passes, through torch.export with every operator written out, and through Dynamo."""
    model = graphs.Decoder()
    gm, _ = exported(model)
    gm = run_passes(gm, [], PassOptions(selection=selection), (*EXPORT_PASSES, *PORTABLE_PASSES))
    assert not {"masked_scatter", "plan"} & set(ops(gm))
    assert not any(str(node.target).startswith("hawk.") for node in gm.graph.nodes)

    def backend(graph, example_inputs):
        return run_passes(graph, example_inputs, PassOptions())

    from hawk_compile.capture.dynamo import capture_settings

    compiled = torch.compile(graphs.planned(model), backend=backend, dynamic=True, fullgraph=True)
    for rows, length, visual, kept in ((2, 12, 5, 2), (3, 17, 9, 1), (4, 30, 20, 7)):
        inputs = graphs.prompt(rows, length, visual)
        plan = graphs.plan_of(inputs, kept)
        with torch.no_grad(), capture_settings():
            expected = compiled(inputs, plan)
            found = gm(inputs, plan)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inlining_a_second_time_changes_nothing():
    gm, _ = exported()
    gm = run_passes(gm, [], PassOptions(), EXPORT_PASSES)
    assert any(str(node.target).startswith("hawk.") for node in gm.graph.nodes)
    gm = inline_operators(gm, [])
    targets = [node.target for node in gm.graph.nodes]
    assert not any(str(target).startswith("hawk.") for target in targets)
    assert [node.target for node in inline_operators(gm, []).graph.nodes] == targets


def test_masked_scatter_of_another_form_is_left_alone():
    class Flat(nn.Module):
        def forward(self, x, mask, rows):
            return x.masked_scatter(mask, rows)

    given = (torch.zeros(6), torch.tensor([True, False] * 3), torch.arange(3.0))
    gm = replace_masked_scatter(torch.export.export(Flat(), given, strict=False).module(), [])
    assert "masked_scatter" in ops(gm)
