import pytest
import torch
import torch.nn.functional as F

from hawk_compile.errors import GraphError
from hawk_compile.passes.compare_slots import compare_slots
from hawk_compile.passes.graph import ancestors, is_call
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.site import Located, read
from tests.passes import graphs


class Blocks(graphs.Decoder):
    """A decoder whose mask asks which slots come before a position; `indexed` also counts blocks of keys by it."""

    def __init__(self, indexed: bool = False):
        super().__init__()
        self.indexed = indexed

    def forward(self, ids, features, attention_mask, positions):
        hidden = self.embed(ids).masked_scatter((ids == graphs.IMAGE).unsqueeze(-1), features)
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        angle = (positions[:, None, :].float() / 10).transpose(1, 2).unsqueeze(1)
        query, key, value = (
            linear(self.norm(hidden)).view(*ids.shape, graphs.HEADS, graphs.HEAD_DIM).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        query, key = query * angle.cos(), key * angle.cos()
        slots = torch.arange(key.shape[2])
        future = slots[None, None, None, :] > positions[:, None, :, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=~future)
        hidden = hidden + attended.transpose(1, 2).reshape(*ids.shape, graphs.WIDTH)
        return hidden.gather(1, (positions // 4)[..., None].expand_as(hidden)) if self.indexed else hidden


def graph_of(model):
    return locate_prefill(graphs.captured(model, *graphs.prompt()), [])


def comparison(gm):
    return next(node for node in gm.graph.nodes if is_call(node, "gt"))


def test_queries_are_compared_by_their_slots_and_rotated_by_their_positions():
    gm = graph_of(Blocks())
    counters = {node for node in read(gm, Located).position_chain if is_call(node, "arange")}
    compare_slots(gm, [])
    gm.graph.lint()
    right = comparison(gm).args[1]
    assert is_call(right, "expand") and is_call(right.args[0], "reshape")
    assert is_call(counted := right.args[0].args[0], "arange") and counted not in counters
    assert counters & ancestors(read(gm, Located).attention), "rotations keep the positions"


def test_numbers_stay_the_same_and_a_second_run_changes_nothing():
    model, inputs = Blocks().eval(), graphs.prompt()
    graphs_seen = []

    def backend(gm, example_inputs):
        compare_slots(locate_prefill(gm, example_inputs), example_inputs)
        before = len(gm.graph.nodes)
        compare_slots(gm, example_inputs)
        graphs_seen.append(len(gm.graph.nodes) - before)
        gm.recompile()
        return gm

    with torch.no_grad(), graphs.capture_settings():
        found = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, model(*inputs), atol=0, rtol=0)
    assert graphs_seen == [0]


def test_a_graph_that_compares_slots_with_slots_is_left_alone():
    gm = graph_of(graphs.Decoder())
    before = gm.graph.python_code("self").src
    compare_slots(gm, [])
    assert gm.graph.python_code("self").src == before


def test_a_decoder_that_counts_keys_by_positions_is_refused_by_name():
    with pytest.raises(GraphError, match=r"computes with the positions of tokens .* as with slots of the cache"):
        compare_slots(graph_of(Blocks(indexed=True)), [])
