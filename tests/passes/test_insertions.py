"""What the passes insert in front of the decoder: scores, budget, ranking, quotas, selection."""

import pytest
import torch
from torch import SymInt

from hawk_compile.capture.dynamo import capture_settings
from hawk_compile.compile.pipeline import PassOptions, run_passes
from hawk_compile.errors import GraphError
from hawk_compile.passes.graph import ancestors, expr, is_call, same, value
from hawk_compile.passes.insert_budget import insert_budget
from hawk_compile.passes.insert_quotas import insert_quotas
from hawk_compile.passes.insert_ranking import insert_ranking
from hawk_compile.passes.insert_scoring import Ranks, insert_scoring
from hawk_compile.passes.insert_selection import insert_selection
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.refresh_values import refresh_values
from hawk_compile.passes.site import Budgeted, Located, Ordered, Ranked, Scored, Selected, read
from hawk_compile.passes.split_at_merge import split_at_merge
from tests.passes import graphs
from tests.passes.sequence import PASSES, after, names
from tests.rounded import round_weights, unround_weights


def test_scoring_inserts_the_folded_operator_and_leaves_the_decoder_alone():
    before, gm = after(split_at_merge), after(insert_scoring)
    assert names(gm).count("score_folded.default") == 1 and "score_projected.default" not in names(gm)
    assert names(gm).count("layer_norm") == names(before).count("layer_norm") + 1
    assert read(gm, Scored).scores not in ancestors(read(gm, Located).attention)


def test_scoring_is_projected_behind_a_norm():
    gm = after(insert_scoring, graphs.Decoder(qk_norm=True))
    assert names(gm).count("score_projected.default") == 1 and "score_folded.default" not in names(gm)


def test_scoring_refuses_head_weights_of_another_length():
    inputs = graphs.prompt()
    plan = list(graphs.plan_of(inputs, 2))
    plan[2] = torch.ones(3) / 3
    torch._dynamo.mark_static(plan[2])
    gm = graphs.captured(graphs.planned(graphs.Decoder()), inputs, tuple(plan))
    split_at_merge(locate_prefill(gm, []), [])
    with pytest.raises(GraphError, match="query heads"):
        insert_scoring(gm, [])


def scores_of(model, weights, **options):
    """[B, S]: what the planned graph scores with these head weights, in PyTorch."""
    inputs = graphs.prompt()
    ahead, behind = graphs.plan_of(inputs, 2)[:2], graphs.plan_of(inputs, 2)[3:]
    torch._dynamo.mark_static(weights)
    compiled = torch.compile(
        graphs.planned(model), backend=lambda gm, given: run_passes(gm, given, PassOptions(**options)), dynamic=True,
        fullgraph=True, isolate_recompiles=True,
    )  # fmt: skip
    with torch.no_grad(), capture_settings():
        return compiled(inputs, (*ahead, weights, *behind))[3]


def test_a_norm_scores_alike_on_both_sides_of_position():
    """What leaves position out leaves nothing else out."""
    model, weights = graphs.Decoder(qk_norm=True), torch.tensor([0.3, 0.7])
    model.qk_norm.weight.data.uniform_(0.5, 2)
    before = scores_of(model, weights)
    model.norm_behind = True
    torch.testing.assert_close(scores_of(model, weights), before)
    model.has_qk_norm = False
    assert not torch.allclose(scores_of(model, weights), before, rtol=1e-2)


@pytest.mark.parametrize("query", ["mean", "each", pytest.param("content", marks=pytest.mark.slow)])
def test_weights_that_are_no_plain_tensors_score_as_the_same_numbers_in_plain_ones(query):
    """The one from the projections, the other folded."""
    model, weights = graphs.Decoder(), torch.tensor([0.3, 0.7])
    exact = scores_of(model, weights, query=query)
    round_weights(model)
    projected = scores_of(model, weights, query=query)
    unround_weights(model)
    torch.testing.assert_close(scores_of(model, weights, query=query), projected)
    assert not torch.allclose(exact, projected, rtol=1e-5)  # or rounding would show nothing


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_scores_by_its_own_heads_and_asks_for_the_sum(rank, monkeypatch):
    """A sum that says nothing of other ranks shows what this one gave to it."""
    model, weights, asked = graphs.Decoder(), torch.tensor([0.1, 0.2, 0.3, 0.4]), []

    def all_reduce(scores, operation, group):
        asked.append((operation, group))
        return 2 * scores

    monkeypatch.setattr("hawk_compile.passes.insert_scoring.all_reduce", all_reduce)
    summed = scores_of(model, weights, ranks=Ranks("both", rank, 2))
    assert set(asked) == {("sum", "both")}
    asked.clear()
    alone = scores_of(model, weights[2 * rank : 2 * rank + 2].clone(), ranks=Ranks("both", rank, 2))
    assert not asked  # as many weights as heads: nothing is shared
    assert alone.any()
    torch.testing.assert_close(summed, 2 * alone)


def test_a_rank_refuses_what_needs_all_heads_at_once():
    inputs = graphs.prompt()
    plan = list(graphs.plan_of(inputs, 2))
    plan[2] = torch.ones(2 * graphs.HEADS)
    torch._dynamo.mark_static(plan[2])
    gm = graphs.captured(graphs.planned(graphs.Decoder()), inputs, tuple(plan))
    split_at_merge(locate_prefill(gm, []), [])
    with pytest.raises(GraphError, match=r'query="content" weighs .* by all heads at once.*take "each"'):
        insert_scoring(gm, [], query="content", ranks=Ranks("both", 0, 2))


def with_more_in_the_plan(last, least=None, image=None, floor=None, mass=None):
    """The graph after the passes up to `last`, its plan with bounds or with floors for images."""
    inputs = graphs.prompt()
    plan = (*graphs.plan_of(inputs, 4), None, least, image, floor)  # None: all that is merged may be removed
    gm = graphs.captured(graphs.planned(graphs.Decoder()), inputs, plan)
    for each in PASSES[: PASSES.index(last) + 1]:
        gm = each(gm, [], mass=mass) if each is insert_budget else each(gm, [])
        gm.graph.lint()
    return gm


def test_quotas_order_what_is_selected_and_leave_the_scores_to_the_caller():
    ids = graphs.prompt()[0]
    image = torch.where(ids >= graphs.IMAGE - 1, 0, -1)
    gm = with_more_in_the_plan(insert_selection, image=image, floor=(image == 0) * 2)
    assert names(gm).count("guaranteed_first") == 1
    select = next(node for node in gm.graph.nodes if node.target is torch.ops.hawk.select.default)
    assert select.args[0] is read(gm, Ordered).ranks
    assert read(gm, Ranked).scores in list(gm.graph.nodes)[-1].args[0]
    before = list(gm.graph.nodes)
    assert list(insert_quotas(gm, []).graph.nodes) == before


def test_without_floors_nothing_is_ordered():
    gm = after(insert_quotas)
    assert "guaranteed_first" not in names(gm) and read(gm, Ordered).ranks is read(gm, Ranked).scores


def test_a_budget_by_mass_makes_sizes_of_its_own():
    gm = with_more_in_the_plan(refresh_values, least=torch.ones(1, dtype=torch.int64), mass=0.5)
    assert names(gm).count("tokens_for_mass") == 1
    length = value(read(gm, Budgeted).kept_length)
    assert isinstance(length, SymInt) and not same(length, read(gm, Located).length)
    assert same(value(read(gm, Selected).keep).shape[1], length)


def test_selection_answers_the_plan():
    gm = after(insert_selection)
    assert not any(is_call(node, "plan") for node in gm.graph.nodes) and names(gm).count("select.default") == 1
    outputs = list(gm.graph.nodes)[-1].args[0]
    assert {read(gm, Selected).keep, read(gm, Selected).valid, read(gm, Ranked).scores} <= set(outputs)


def test_a_budget_without_plan_is_an_expression_of_the_graphs_own_sizes():
    from fractions import Fraction

    gm = graphs.captured(graphs.Decoder(), *graphs.prompt())
    for each in PASSES[: PASSES.index(insert_budget)]:
        gm = each(gm, [])
    insert_budget(gm, [], removed=Fraction(3, 5))
    kept = expr(value(read(gm, Budgeted).kept_length))
    symbols = {str(symbol) for symbol in kept.free_symbols}
    assert {str(expr(read(gm, Located).length)), str(expr(read(gm, Located).visual[0]))} <= symbols


def widths(embeddings, visual_mask):
    return embeddings.norm(dim=2).masked_fill(~visual_mask, 0)


def test_a_ranking_takes_the_place_of_the_scores():
    gm = after(insert_budget)
    scored = read(gm, Scored).scores
    gm = insert_ranking(gm, [], ranking=widths)
    gm.graph.lint()
    assert read(gm, Ranked).scores is not scored and "score_folded.default" not in names(gm) and "widths" in names(gm)
    assert value(read(gm, Ranked).scores).dtype == torch.float32
    assert read(gm, Scored).visual_mask in gm.graph.nodes and read(gm, Scored).token_mask in gm.graph.nodes
    before = gm.graph.python_code("self").src
    assert insert_ranking(gm, [], ranking=widths).graph.python_code("self").src == before


def test_a_ranking_that_reads_the_scores_keeps_them():
    gm = insert_ranking(after(insert_budget), [], ranking=lambda scores, factor: scores * factor,
                        ranking_options=(("factor", 2.0),))  # fmt: skip
    assert "score_folded.default" in names(gm)


@pytest.mark.parametrize(("ranking", "message"), [
    (lambda pixels: pixels, "reads pixels; there are scores, embeddings"),
    (lambda scores: scores.nonzero(), "must return a float tensor"),
    (lambda scores: scores[:, :1000].view(3, 7), "cannot be traced with symbolic sizes"),
])  # fmt: skip
def test_rankings_that_cannot_be_inserted(ranking, message):
    with pytest.raises(GraphError, match=message):
        insert_ranking(after(insert_budget), [], ranking=ranking)
