"""The passes that rewrite, one after the other, on a small graph."""

import itertools
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import SymInt

from hawk_compile.compile.pipeline import PassOptions, run_passes
from hawk_compile.errors import GraphError, ShapeError
from hawk_compile.passes.gather_by_shape import gather_by_shape
from hawk_compile.passes.graph import expr, is_call, same, value
from hawk_compile.passes.insert_selection import insert_selection
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.refresh_values import refresh_values
from hawk_compile.passes.site import Budgeted, Gathered, Located, Split, read
from hawk_compile.passes.split_at_merge import split_at_merge
from tests.passes import graphs
from tests.passes.sequence import PASSES, after


def test_a_pass_that_runs_too_early_names_what_is_missing():
    inputs = graphs.prompt()
    gm = graphs.captured(graphs.planned(graphs.Decoder()), inputs, graphs.plan_of(inputs, 2))
    for early in PASSES[PASSES.index(split_at_merge) :]:
        with pytest.raises(GraphError, match=r"a pass needs \w+ in front of it, which has not run"):
            early(gm, [])


def test_what_was_found_never_changes():
    located = read(after(insert_selection), Located)
    with pytest.raises(FrozenInstanceError):
        located.plan = None


def test_split_puts_what_depends_on_the_merge_behind_it():
    gm = after(split_at_merge)
    order = list(gm.graph.nodes)
    boundary = order.index(read(gm, Split).boundary)
    assert order.index(read(gm, Located).merged) < boundary
    assert all(node in read(gm, Split).full for node in order[:boundary])
    assert all(is_call(node, "arange") is False for node in order[:boundary])


def test_split_changes_no_number():
    model, inputs = graphs.Decoder(), graphs.prompt()
    gm = graphs.captured(model, *inputs)
    expected = gm(*inputs_of(gm, model, inputs))[0]
    split_at_merge(locate_prefill(gm, []), [])
    gm.recompile()
    assert torch.equal(gm(*inputs_of(gm, model, inputs))[0], expected)


def inputs_of(gm, model, inputs):
    """The graph's placeholders, filled by what they are named after: weights, sizes, inputs."""
    parameters = {name.replace(".", "_"): parameter for name, parameter in model.named_parameters()}
    named = dict(zip(("ids", "features", "attention_mask", "positions"), inputs, strict=True))
    shapes = {
        str(expr(size)): int(real)
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and isinstance(found := value(node), torch.Tensor)
        and (key := name_of(node, named)) is not None
        for size, real in zip(found.shape, named[key].shape, strict=True)
    }
    filled = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if isinstance(value(node), SymInt):
                filled.append(shapes[str(expr(value(node)))])
            elif (key := name_of(node, named)) is not None:
                filled.append(named[key])
            else:
                filled.append(next(p for n, p in parameters.items() if plain(n) in plain(node.name)))
    return filled


def plain(name):
    return name.replace("_modules", "").replace("_parameters", "").replace("_", "")


def name_of(node, named):
    return next((name for name in named if node.name == f"l_{name}_" or node.name.endswith(f"_{name}_")), None)


def test_gather_lets_attention_run_at_the_pruned_length():
    gm = after(refresh_values)
    queries = value(read(gm, Located).attention).shape[2]
    assert same(queries, value(read(gm, Budgeted).kept_length)) and not same(queries, read(gm, Located).length)
    kinds = {(shape_kind, len(shape)) for _, shape, shape_kind in read(gm, Gathered).values}
    assert ("tokens", 3) in kinds and ("tokens", 2) in kinds


def test_a_second_run_changes_nothing():
    gm = after(refresh_values)
    once = gm.graph.python_code("self").src
    for each in PASSES:
        gm = each(gm, [])
    assert gm.graph.python_code("self").src == once


def test_symbolic_sizes_stay_symbolic():
    gm = after(refresh_values)
    for size in (read(gm, Located).length, read(gm, Located).visual[0], value(read(gm, Budgeted).kept_length)):
        assert not expr(size).is_number


def pruned(model, rows=1):
    """A compiled, pruned version of the model: (inputs, plan) -> (output, keep, valid, scores)."""

    def backend(gm, example_inputs):
        return run_passes(gm, example_inputs, PassOptions())

    from hawk_compile.capture.dynamo import capture_settings

    compiled = torch.compile(
        graphs.planned(model), backend=backend, dynamic=True, fullgraph=True, isolate_recompiles=True
    )

    def call(inputs, kept):
        with torch.no_grad(), capture_settings():
            return compiled(inputs, graphs.plan_of(inputs, kept))

    return call


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_result_equals_the_model_on_hand_gathered_inputs(rows, qk_norm, own_positions):
    model = graphs.Decoder(qk_norm=qk_norm, own_positions=own_positions)
    call = pruned(model)
    for length, visual, kept in ((12, 5, 2), (17, 9, 1), (30, 20, 7)):
        inputs = graphs.prompt(rows, length, visual)
        output, keep, valid, _ = call(inputs, kept)
        assert valid.all() and keep.shape == (rows, length - visual + kept)
        expected = gathered_by_hand(model, inputs, keep)
        assert torch.equal(output, expected)


def gathered_by_hand(model, inputs, keep):
    """The model on merged embeddings that stand in its embedding table, one row for each kept token."""
    ids, features, mask, _ = inputs
    hidden = model.embed(ids).masked_scatter((ids == graphs.IMAGE).unsqueeze(-1), features).detach()
    kept = hidden.gather(1, keep.unsqueeze(-1).expand(-1, -1, graphs.WIDTH))
    rows, length = keep.shape
    alone = graphs.Decoder(qk_norm=model.has_qk_norm)
    alone.load_state_dict({**model.state_dict(), "embed.weight": torch.zeros(graphs.VOCABULARY, graphs.WIDTH)})
    alone.embed = torch.nn.Embedding.from_pretrained(kept.reshape(-1, graphs.WIDTH))
    own_ids = torch.arange(rows * length).reshape(rows, length) + 1000
    table = torch.zeros(1000 + rows * length, graphs.WIDTH)
    table[1000:] = kept.reshape(-1, graphs.WIDTH)
    alone.embed = torch.nn.Embedding.from_pretrained(table)
    with torch.no_grad():
        return alone(own_ids, features, mask.gather(1, keep), keep)


def test_two_merges_lose_tokens_together():
    model = graphs.Decoder(merges=2)
    inputs = graphs.prompt(merges=2, visual=6)
    with torch.no_grad():
        output, keep, valid, scores = pruned(model)(inputs, 2)
    assert output.shape[1] == 12 - 6 + 2 and valid.all()
    text = [0, 1, 8, 9, 10, 11]
    assert set(text) <= set(keep[0].tolist()) and (scores[0, text] == 0).all()


def test_a_value_whose_length_is_a_multiple_of_the_prompt_is_refused():
    class Doubled(graphs.Decoder):
        def forward(self, ids, features, attention_mask, positions):
            twice = torch.cat([positions, positions], 1)
            return super().forward(ids, features, attention_mask, positions) + twice.sum()

    class DoubledInput(graphs.Decoder):
        def forward(self, ids, features, attention_mask, positions):
            hidden = self.embed(torch.cat([ids, ids], 1))[:, : ids.shape[1]]
            doubled = hidden.repeat(1, 2, 1)
            merged = hidden.masked_scatter((ids == graphs.IMAGE).unsqueeze(-1), features + doubled.sum())
            query = merged.unsqueeze(1)
            return torch.nn.functional.scaled_dot_product_attention(query, doubled.unsqueeze(1), doubled.unsqueeze(1))

    after(gather_by_shape, Doubled())
    with pytest.raises(GraphError):
        after(gather_by_shape, DoubledInput())


class EqualSizes(graphs.Decoder):
    """V and S are one symbol, as Dynamo's default gives equal sizes; features enter the decoder once more if asked."""

    def __init__(self, later=False):
        super().__init__(own_positions=True)
        self.later = later

    def forward(self, ids, features, attention_mask, positions):
        torch._check(features.shape[0] == ids.shape[1])
        result = super().forward(ids, features, attention_mask, positions)
        return result + (result.amax() * features).amax() if self.later else result


def test_as_many_visual_tokens_as_positions_are_pruned_like_any_other_number():
    model, inputs = EqualSizes(), graphs.prompt(rows=2, length=12, visual=6)
    output, keep, valid, _ = pruned(model)(inputs, 2)
    assert valid.all() and keep.shape == (2, 8)
    assert torch.equal(output, gathered_by_hand(model, inputs, keep))


def test_features_for_later_layers_are_refused_where_no_size_tells_them_from_tokens():
    with pytest.raises(ShapeError, match="as many visual tokens as positions"):
        after(gather_by_shape, EqualSizes(later=True), graphs.prompt(rows=2, length=12, visual=6))


class LastAlone(graphs.Decoder):
    """A second layer that runs over the last position alone, as where layers share keys and one logit is wanted."""

    def forward(self, ids, features, attention_mask, positions):
        hidden = super().forward(ids, features, attention_mask, positions)
        heads = [part.unflatten(-1, (graphs.HEADS, -1)).transpose(1, 2) for part in (self.q(hidden[:, -1:]), hidden)]
        return F.scaled_dot_product_attention(heads[0], heads[1], heads[1]).transpose(1, 2).flatten(2)


def test_a_layer_may_run_over_the_last_position_alone():
    gm = after(refresh_values, LastAlone())
    queries = [value(node).shape[2] for node in gm.graph.nodes if is_call(node, "scaled_dot_product_attention")]
    assert queries[1] == 1 and same(queries[0], value(read(gm, Budgeted).kept_length))


def test_refresh_names_the_node_that_still_sees_the_full_length():
    gm = after(gather_by_shape)
    node = read(gm, Located).attention
    mask = node.kwargs["attn_mask"]
    full = torch.empty(3, 5)
    with gm.graph.inserting_before(node):
        wrong = gm.graph.call_function(torch.ones, ((3, 5),))
        wrong.meta["example_value"] = full
    node.kwargs = {**node.kwargs, "attn_mask": wrong}
    assert mask is not wrong
    with pytest.raises(ShapeError, match=node.name):
        refresh_values(gm, [])


def test_order_of_tests_matches_the_pipeline():
    from hawk_compile.compile.pipeline import PASSES as pipeline

    behind = ["replace_masked_scatter", "fold_layers"]
    assert [step.name for step in pipeline] == [*(each.__name__ for each in PASSES), *behind]
    assert all(first is not second for first, second in itertools.pairwise(PASSES))
