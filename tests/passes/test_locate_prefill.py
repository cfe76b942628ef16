import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hawk_compile.errors import AttentionNotFoundError, GraphError, MergeNotFoundError, ShapeError
from hawk_compile.passes.functionalize_writes import functionalize_writes
from hawk_compile.passes.graph import is_call, op_name, same
from hawk_compile.passes.locate_prefill import find_merges, locate_prefill
from hawk_compile.passes.site import Located, find, read
from tests.passes import graphs
from tests.rounded import round_weights, unround_weights


def read_located(gm):
    return read(gm, Located)


def located(model, **options):
    merges = options.pop("merges", 1)
    gm = graphs.captured(model, *graphs.prompt(merges=merges), **options)
    return locate_prefill(gm, [])


def test_finds_merge_attention_heads_and_the_folded_form():
    gm = located(graphs.Decoder())
    site = read_located(gm)
    assert is_call(site.merged, "masked_scatter") and site.merges == (site.merged,)
    assert is_call(site.attention, "scaled_dot_product_attention")
    assert (site.heads, site.kv_heads, site.head_dim) == (graphs.HEADS, graphs.HEADS, graphs.HEAD_DIM)
    assert site.form == "folded" and site.between == ()
    assert is_call(site.query_linear, "linear") and is_call(site.key_linear, "linear")
    assert is_call(site.normed, "layer_norm")
    assert isinstance(site.length, torch.SymInt)


def test_changes_nothing():
    gm = graphs.captured(graphs.Decoder(), *graphs.prompt())
    before = gm.graph.python_code("self").src
    locate_prefill(gm, [])
    assert gm.graph.python_code("self").src == before


def test_a_norm_between_projection_and_position_makes_the_form_projected():
    site = read_located(located(graphs.Decoder(qk_norm=True)))
    assert site.form == "projected" and site.between == ("layer_norm",)
    assert is_call(site.query, "layer_norm") and is_call(site.key, "layer_norm")


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_weight_that_is_no_plain_tensor_makes_the_form_projected(which):
    model = graphs.Decoder()
    round_weights(nn.ModuleList([getattr(model, which)]))
    site = read_located(located(model))
    assert site.form == "projected" and site.between == () and is_call(site.query_linear, "linear")
    unround_weights(model)
    assert read_located(located(model)).form == "folded"


def test_a_norm_behind_position_is_computed_without_it():
    site = read_located(located(graphs.Decoder(qk_norm=True, norm_behind=True)))
    assert site.form == "projected" and site.between == ("layer_norm",)
    assert is_call(site.query, "layer_norm") and is_call(site.key, "layer_norm")
    for normed in (site.query, site.key):
        rotated = normed.args[0]
        assert is_call(rotated, "add") and is_call(site.rotated[rotated], "transpose")
    site = read_located(located(graphs.Decoder()))
    assert site.rotated == {}, "what only moves and scales is left to the attention"


def test_two_merges_are_one_site():
    site = read_located(located(graphs.Decoder(merges=2), merges=2))
    assert len(site.merges) == 2 and site.merged is site.merges[-1] and len(site.visual) == 2


class Mixed(nn.Module):
    """A layer in which tokens meet without keys, or by attention in steps."""

    def __init__(self, attends):
        super().__init__()
        self.attends = attends

    def forward(self, x):
        if not self.attends:
            return x + x.cumsum(1)
        heads = x.unsqueeze(1)
        return x + (F.softmax(heads @ heads.transpose(2, 3), -1) @ heads).squeeze(1)


@pytest.mark.parametrize("attends", [False, True])
def test_what_later_layers_merge_is_no_merge_of_the_prompt(attends):
    layers, embed = nn.ModuleList([Mixed(attends)]), nn.Embedding(8, 4)

    def forward(ids, encoded, features):
        mask = (ids == 7).unsqueeze(-1)
        merged = embed(ids).masked_scatter(mask, layers[0](encoded).flatten(0, 1))
        return layers[0](merged).masked_scatter(mask, features)

    ids = torch.tensor([[1, 7, 7, 7, 2, 3, 4, 5, 6]])
    merges = find_merges(graphs.captured(forward, ids, torch.ones(1, 3, 4), torch.ones(3, 4)).graph)
    assert len(merges) == 1 and op_name(merges[0].args[0]) == "embedding"


def test_features_that_enter_behind_a_layer_that_attends_are_refused():
    layers, embed = nn.ModuleList([Mixed(False), Mixed(True)]), nn.Embedding(8, 4)

    def forward(ids, features):
        mask = (ids == 7).unsqueeze(-1)
        return layers[1](embed(ids)).masked_scatter(mask, features).masked_scatter(mask, features)

    ids = torch.tensor([[1, 7, 7, 7, 2, 3, 4, 5, 6]])
    with pytest.raises(GraphError, match=r"enter this model behind the attention of layer 1 .* every token"):
        find_merges(graphs.captured(forward, ids, torch.ones(3, 4)).graph)
    layers[1] = layers[0]
    assert len(find_merges(graphs.captured(forward, ids, torch.ones(3, 4)).graph)) == 2


def test_positions_that_the_graph_counts_itself_are_told_from_slots():
    site = read_located(located(graphs.Decoder(own_positions=True)))
    assert [node.name for node in site.position_chain if is_call(node, "arange")] != []
    assert read_located(located(graphs.Decoder())).position_chain == frozenset()


class Sorting(graphs.Decoder):
    """Tokens are put in an order that depends on them and back, as for experts that each take theirs at once."""

    def forward(self, *inputs):
        hidden = super().forward(*inputs)
        order = hidden.sum(-1).flatten().argsort()
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return hidden.flatten(0, 1)[order][inverse].view_as(hidden)


def test_the_inverse_of_an_order_counts_no_positions():
    gm = functionalize_writes(graphs.captured(Sorting(), *graphs.prompt()), [])
    assert any(is_call(node, "written") for node in gm.graph.nodes)
    assert read_located(locate_prefill(gm, [])).position_chain == frozenset()


def test_the_padding_mask_is_found_by_name_and_length():
    """Only equal symbols count, and a mask is as long as the prompt only if something says so."""

    def call(*inputs):
        torch._check(inputs[2].shape[1] == inputs[0].shape[1])
        return model(ids=inputs[0], features=inputs[1], attention_mask=inputs[2], positions=inputs[3])

    model = graphs.Decoder()
    site = read_located(locate_prefill(graphs.captured(call, *graphs.prompt()), []))
    assert site.padding_mask is None or same(site.padding_mask.meta["example_value"].shape[1], site.length)


def test_a_graph_without_merge_is_refused():
    gm = graphs.captured(nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(MergeNotFoundError, match="masked_scatter"):
        locate_prefill(gm, [])
    assert find(gm, Located) is None


def test_a_graph_without_attention_after_the_merge_is_refused():
    def merge_only(ids, features):
        hidden = F.one_hot(ids, 8).float()
        return hidden.masked_scatter((ids == 7).unsqueeze(-1), features) * 2

    gm = graphs.captured(merge_only, torch.tensor([[1, 7, 7, 2]]), torch.randn(2, 8))
    with pytest.raises(AttentionNotFoundError, match="attn_implementation"):
        locate_prefill(gm, [])


def test_an_attention_that_does_not_read_the_merge_is_refused():
    class Apart(graphs.Decoder):
        def forward(self, ids, features, attention_mask, positions):
            hidden = self.embed(ids).masked_scatter((ids == graphs.IMAGE).unsqueeze(-1), features)
            other = self.embed(ids).unsqueeze(1)
            return hidden.sum() + F.scaled_dot_product_attention(other, other, other).sum()

    with pytest.raises(AttentionNotFoundError):
        located(Apart())


def test_a_fixed_length_that_is_also_another_size_is_refused():
    gm = graphs.captured(graphs.Decoder(), *graphs.prompt(length=graphs.WIDTH), dynamic=False)
    with pytest.raises(ShapeError, match="dynamic=True"):
        locate_prefill(gm, [])


def test_every_refusal_is_a_graph_error():
    assert all(issubclass(kind, GraphError) for kind in (AttentionNotFoundError, MergeNotFoundError, ShapeError))
