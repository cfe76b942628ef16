"""How large a pruned graph's values become, on tensors without memory: no square of a long prompt, no second peak."""

import pytest

from benchmarks.simulate_gpu import TEXT, Graphs, as_aten, lengths, peak, size, tensors
from hawk_compile import HawkConfig
from hawk_compile.passes.site import Split, read
from hawk_compile.tools.benchmarking.profiles import tiny

KEPT = HawkConfig(ratio=0.8).kept


def nodes_of(graphs, gm, visual, kept):
    """(front, decoder half) of a graph of two layers in ATen operators; of one that is not pruned all is the second."""
    sizes = dict(zip(graphs.captured_at, lengths(visual, kept), strict=True))
    nodes = list(gm.graph.nodes)
    cut = nodes.index(read(gm, Split).boundary) if gm is graphs.pruned[1] else 0
    return as_aten(gm, frozenset(nodes[:cut]), sizes)


@pytest.fixture(scope="module")
def narrow():
    return Graphs(tiny())


def squares(nodes, length):
    """Values with two sizes of `length` or more."""
    return [node.name for node in nodes for each in tensors(node) if sum(size >= length for size in each.shape) > 1]


@pytest.mark.parametrize("visual", [16_384, 65_536])
def test_no_mask_of_all_positions_by_all(narrow, visual):
    """Neither S x S nor S' x S', which for 65,536 visual tokens are 4.3 and .17 GB of bools."""
    front, decoder = nodes_of(narrow, narrow.pruned[1], visual, KEPT(visual))
    assert front and decoder
    assert squares(front + decoder, TEXT + KEPT(visual)) == []


def test_nothing_grows_faster_than_the_prompt(narrow):
    """Of four times the tokens no value is more than four times as large."""
    found = []
    for visual in (16_384, 65_536):
        front, decoder = nodes_of(narrow, narrow.pruned[1], visual, KEPT(visual))
        found.append([size(node) for node in front + decoder])
    assert len(found[0]) == len(found[1])
    assert all(large <= 4 * small for small, large in zip(*found, strict=True))
    assert max(found[1]) > 3 * max(found[0])


def test_a_pruned_prefill_peaks_no_higher_than_a_short_prompt_and_the_features(narrow):
    """With 80 % removed; with 90 %, three copies of the features in front are more than both."""
    width = tiny().get_text_config().hidden_size
    for visual in (1024, 16_384):
        kept = KEPT(visual)
        front, decoder = nodes_of(narrow, narrow.pruned[1], visual, kept)
        short, whole = (nodes_of(narrow, narrow.plain[1], each, each)[1] for each in (kept, visual))
        features = visual * width * 2
        assert peak(front + decoder) <= peak(short) + features
        assert peak(front) <= 3.2 * features
        assert peak(front + decoder) < peak(whole) / 2
