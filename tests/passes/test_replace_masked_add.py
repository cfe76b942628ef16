import pytest
import torch

from hawk_compile.passes.functionalize_writes import functionalize_writes
from hawk_compile.passes.replace_masked_add import replace_masked_add
from tests.passes import graphs


def add_at_mask(hidden, mask, features):
    hidden = hidden.clone()
    part = hidden[mask, :] + features
    hidden[mask, :] = part
    return hidden * 2


def add_at_mask_in_atens_words(hidden, mask, features):
    part = torch.ops.aten.index.Tensor(hidden, [mask])
    return torch.ops.aten.index_put.default(hidden, [mask], torch.ops.aten.add.Tensor(part, features)) * 2


def inputs(seed=0, rows=2, length=7):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.5
    mask[0, 0], mask[-1, -1] = False, True
    hidden = torch.randn(rows, length, 4, generator=generator)
    return hidden, mask, torch.randn(int(mask.sum()), 4, generator=generator)


def captured(function):
    return functionalize_writes(graphs.captured(function, *inputs()), [])


def names(gm):
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes]


@pytest.mark.parametrize("function", [add_at_mask, add_at_mask_in_atens_words])
def test_rows_are_added_without_an_index_by_mask(function):
    gm = captured(function)
    assert any(name in ("written", "index_put.default") for name in names(gm))
    gm = replace_masked_add(gm, [])
    gm.graph.lint()
    assert not any(name in ("written", "getitem", "index_put.default", "index.Tensor") for name in names(gm))
    assert not any("assert" in name for name in names(gm))


@pytest.mark.parametrize("function", [add_at_mask, add_at_mask_in_atens_words])
def test_numbers_stay_the_same(function):
    seen = []

    def backend(gm, example_inputs):
        replace_masked_add(functionalize_writes(gm, example_inputs), example_inputs)
        gm.recompile()
        seen.append(names(gm))
        return gm

    from hawk_compile.capture.dynamo import capture_settings

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True, isolate_recompiles=True)
    with capture_settings():
        for seed, length in ((1, 7), (2, 12), (3, 30)):
            given = inputs(seed, length=length)
            assert torch.equal(compiled(*given), function(*given))
    assert len(seen) == 1 and "where" in seen[0]


def test_a_second_run_changes_nothing():
    gm = replace_masked_add(captured(add_at_mask), [])
    once = gm.graph.python_code("self").src
    assert replace_masked_add(gm, []).graph.python_code("self").src == once


@pytest.mark.parametrize("left_alone", ["part used twice", "another mask", "a product"])
def test_what_is_not_such_an_addition_is_left_alone(left_alone):
    def function(hidden, mask, features):
        hidden = hidden.clone()
        part = hidden[mask, :]
        total = part * features if left_alone == "a product" else part + features
        where = mask.logical_or(mask) if left_alone == "another mask" else mask
        hidden[where, :] = total
        return hidden + part.sum() if left_alone == "part used twice" else hidden

    gm = captured(function)
    before = gm.graph.python_code("self").src
    assert replace_masked_add(gm, []).graph.python_code("self").src == before
