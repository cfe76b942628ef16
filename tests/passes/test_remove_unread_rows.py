import pytest
import torch

from hawk_compile.passes.remove_unread_rows import remove_unread_rows
from tests.passes import graphs


def merged(embeds, mask, features):
    torch._check(embeds[mask].numel() >= features.numel() - features.numel())
    return embeds.masked_scatter(mask.unsqueeze(-1), features) * 2


def inputs():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    return torch.randn(2, 3, 4), mask, torch.randn(3, 4)


def names(gm):
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes]


def test_rows_that_are_only_counted_leave_with_their_checks():
    gm = graphs.captured(merged, *inputs())
    assert "getitem" in names(gm) and any("assert" in name for name in names(gm))
    gm = remove_unread_rows(gm, [])
    gm.graph.lint()
    assert "getitem" not in names(gm) and not any("assert" in name for name in names(gm))
    assert "masked_scatter" in names(gm)
    once = list(gm.graph.nodes)
    assert list(remove_unread_rows(gm, []).graph.nodes) == once


@pytest.mark.parametrize("read", ["rows", "number", "size of another value"])
def test_rows_that_something_reads_are_left_alone(read):
    def function(embeds, mask, features):
        rows = embeds[mask]
        if read == "rows":
            return embeds.masked_scatter(mask.unsqueeze(-1), features), rows * 2
        if read == "number":
            return embeds.masked_scatter(mask.unsqueeze(-1), features), rows.shape[0]
        return embeds.masked_scatter(mask.unsqueeze(-1), features), torch.zeros(rows.shape[0])

    gm = graphs.captured(function, *inputs())
    before = list(gm.graph.nodes)
    assert list(remove_unread_rows(gm, []).graph.nodes) == before
