"""The passes that rewrite, in their order, on the small graphs."""

from hawk_compile.passes.compare_slots import compare_slots
from hawk_compile.passes.functionalize_writes import functionalize_writes
from hawk_compile.passes.gather_by_shape import gather_by_shape
from hawk_compile.passes.insert_budget import insert_budget
from hawk_compile.passes.insert_quotas import insert_quotas
from hawk_compile.passes.insert_ranking import insert_ranking
from hawk_compile.passes.insert_scoring import insert_scoring
from hawk_compile.passes.insert_selection import insert_selection
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.refresh_values import refresh_values
from hawk_compile.passes.refuse_branches import refuse_branches
from hawk_compile.passes.remove_unread_rows import remove_unread_rows
from hawk_compile.passes.replace_masked_add import replace_masked_add
from hawk_compile.passes.split_at_merge import split_at_merge
from tests.passes import graphs

PASSES = (
    remove_unread_rows,
    functionalize_writes,
    locate_prefill,
    compare_slots,
    replace_masked_add,
    split_at_merge,
    insert_scoring,
    insert_budget,
    refuse_branches,
    insert_ranking,
    insert_quotas,
    insert_selection,
    gather_by_shape,
    refresh_values,
)


def after(last, model=None, inputs=None, kept=2):
    """The planned graph after the passes up to `last`."""
    if model is None and inputs is None:
        gm = graphs.of_a_decoder(kept)
    else:
        inputs = inputs or graphs.prompt()
        gm = graphs.captured(graphs.planned(model or graphs.Decoder()), inputs, graphs.plan_of(inputs, kept))
    for each in PASSES[: PASSES.index(last) + 1]:
        gm = each(gm, [])
        gm.graph.lint()
    gm.recompile()
    return gm


def names(gm):
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes]
