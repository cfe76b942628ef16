"""Writes in place become values: whatever they go through, what is read behind them is what was written."""

import pytest
import torch
from torch.utils import deterministic

from hawk_compile.compile.pipeline import PassOptions, run_passes
from hawk_compile.errors import GraphError
from hawk_compile.passes.functionalize_writes import functionalize_writes
from hawk_compile.passes.graph import is_call, written_by
from tests import eager_reference as reference
from tests.passes import graphs


def copies_into_slices(x, mask):
    out = x.new_empty(x.shape[0], 8)
    out[:, :3].copy_(x[:, :3])
    out[..., 3:].copy_(x[:, 3:] * 2)
    return out


def sets_items(x, mask):
    out = torch.empty_like(x)
    out[:, 4:] = x[:, :4]
    out[:, :4] = 1.0
    out[mask] = x[mask] + 1
    return out


def puts_at_indices(x, mask):
    return torch.zeros_like(x).index_put_((mask,), x[mask], accumulate=True)


def multiplies_a_view(x, mask):
    out = x.clone()
    out.unsqueeze(0).transpose(1, 2).mul_(3)
    return out


def writes_out(x, mask):
    out = torch.empty_like(x)
    torch.add(x, 1, out=out)
    return torch.mul(out, 2, out=out)


def reads_a_view_made_before(x, mask):
    out = x.clone()
    half, other = out.chunk(2, dim=1)
    early = half + 0
    out.add_(1)
    half.fill_(7)
    return early, half * other, out.T.contiguous()


def adds(x, mask):
    out = x * 1
    kept = out.view(-1)
    out += 3
    out *= out
    return kept.sum(), torch.relu_(out - 20), torch.nn.functional.relu(kept - 20, inplace=True)


FORMS = [
    copies_into_slices, sets_items, puts_at_indices, multiplies_a_view, writes_out, reads_a_view_made_before, adds,
]  # fmt: skip


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(seed=0, rows=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.rand(rows, generator=generator) < 0.5


def leaves(results):
    return results if isinstance(results, tuple) else (results,)


def check(gm, arguments, expected):
    assert any(written_by(node) for node in gm.graph.nodes)
    functionalize_writes(gm, [])
    gm.graph.lint()
    gm.recompile()
    assert not any(written_by(node) for node in gm.graph.nodes)
    assert any(is_call(node, "written") for node in gm.graph.nodes)
    assert all(map(torch.equal, leaves(gm(*arguments)), leaves(expected)))
    once = gm.graph.python_code("self").src
    assert functionalize_writes(gm, []).graph.python_code("self").src == once


@pytest.mark.parametrize("form", FORMS)
def test_writes_become_values_in_dynamos_graph(form):
    x, mask = inputs()
    gm = graphs.captured(form, x, mask)
    tensors = {"L_x_": x, "L_mask_": mask}
    names = [node.target for node in gm.graph.nodes if node.op == "placeholder"]
    check(gm, [tensors.get(name, x.shape[0]) for name in names], form(x, mask))


@pytest.mark.parametrize("form", FORMS)
def test_writes_become_values_in_exports_graph(form):
    class Module(torch.nn.Module):
        def forward(self, x, mask):
            return form(x, mask)

    x, mask = inputs()
    rows = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Module(), (x, mask), dynamic_shapes=({0: rows}, {0: rows}))
    check(exported.module(), (x, mask), form(x, mask))


def test_a_graph_without_writes_is_left_alone():
    gm = graphs.captured(graphs.planned(graphs.Decoder()), inputs := graphs.prompt(), graphs.plan_of(inputs, 2))
    before = gm.graph.python_code("self").src
    assert functionalize_writes(gm, []).graph.python_code("self").src == before


def test_writes_into_inputs_are_effects_and_stay():
    def counts(x, mask):
        x.add_(1)
        return x * 2

    gm = functionalize_writes(graphs.captured(counts, *inputs()), [])
    assert [node.target for node in gm.graph.nodes if written_by(node)] == ["add_"]


@pytest.mark.parametrize(
    "write",
    [
        lambda one, two: torch._foreach_add_([one, two], 1),
        lambda one, two: one.unsqueeze_(0),
        lambda one, two: torch.max(two, 1, out=(one[:, 0].clone(), one[:, 0].long())),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(write):
    def function(x, mask):
        one, two = x.clone(), x.clone()
        write(one, two)
        return one + two

    with pytest.raises(GraphError, match=r"writes in place into .* cannot be followed"):
        functionalize_writes(graphs.captured(function, *inputs()), [])


WAYS = ("copy_", "setitem", "index_put_", "out", "cat", "permuted")
"""The last one puts the dimensions that rotate in another order before it does."""


class Latent(graphs.Decoder):
    """Keys of two parts: one of its own projection, one that all heads share and that alone rotates."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.fixed = torch.nn.Linear(graphs.WIDTH, graphs.WIDTH // 2)
        self.rotating = torch.nn.Linear(graphs.WIDTH, graphs.HEAD_DIM // 2)

    def parts(self, hidden):
        """Query [B, H, S, d], fixed [B, H, S, d / 2], rotating [B, 1, S, d / 2], before position."""
        normed = self.norm(hidden)
        query = self.q(normed).unflatten(-1, (graphs.HEADS, -1)).transpose(1, 2)
        fixed = self.fixed(normed).unflatten(-1, (graphs.HEADS, -1)).transpose(1, 2)
        return query, fixed, self.rotating(normed).unsqueeze(1)

    def forward(self, ids, features, attention_mask, positions):
        hidden = self.embed(ids).masked_scatter((ids == graphs.IMAGE).unsqueeze(-1), features)
        query, fixed, rotating = self.parts(hidden)
        angle = positions.unsqueeze(-1).float().unsqueeze(1)

        def rope(x):
            if self.way == "permuted":
                x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            return x * angle.cos() + torch.cat([-x[..., 1::2], x[..., ::2]], dim=-1) * angle.sin()

        half = graphs.HEAD_DIM // 2
        query = torch.cat([query[..., :half], rope(query[..., half:])], dim=-1)
        shared = rope(rotating).expand(-1, graphs.HEADS, -1, -1)
        key = self.join(fixed, shared)
        value = self.v(self.norm(hidden)).unflatten(-1, (graphs.HEADS, -1)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return hidden + attended.transpose(1, 2).flatten(2)

    def join(self, fixed, shared):
        half = graphs.HEAD_DIM // 2
        if self.way in ("cat", "permuted"):
            return torch.cat([fixed, shared], dim=-1)
        key = fixed.new_empty(*fixed.shape[:-1], graphs.HEAD_DIM)
        if self.way == "copy_":
            key[..., :half].copy_(fixed)
            key[..., half:].copy_(shared)
        elif self.way == "setitem":
            key[..., :half], key[..., half:] = fixed, shared
        elif self.way == "index_put_":
            last_first = key.movedim(-1, 0)
            last_first.index_put_((torch.arange(half),), fixed.movedim(-1, 0))
            last_first.index_put_((torch.arange(half, 2 * half),), shared.movedim(-1, 0))
        else:
            torch.cat([fixed, shared], dim=-1, out=key)
        return key


@pytest.mark.parametrize("way", WAYS)
def test_keys_that_are_written_in_parts_are_scored_before_rope(way):
    model, prompt = Latent(way), graphs.prompt()
    plan = graphs.plan_of(prompt, 2)

    def backend(gm, example_inputs):
        return run_passes(gm, example_inputs, PassOptions())

    compiled = torch.compile(graphs.planned(model), backend=backend, dynamic=True, isolate_recompiles=True)
    with torch.no_grad(), graphs.capture_settings():
        pruned, keep, _, scores = compiled(prompt, plan)
        ids, features, *_ = prompt
        visual = ids == graphs.IMAGE
        hidden = model.embed(ids).masked_scatter(visual.unsqueeze(-1), features)
        query, fixed, rotating = model.parts(hidden)
        key = torch.cat([fixed, rotating.expand(-1, graphs.HEADS, -1, -1)], dim=-1)
        expected = reference.scores(query[0], key[0], visual[0], ~visual[0], plan[2])
    torch.testing.assert_close(scores[0, visual[0]].double(), expected, atol=1e-6, rtol=1e-5)
    assert keep[0].tolist() == reference.kept_positions(expected, visual[0], 2).tolist()
    assert not pruned.isnan().any() and pruned.shape[1] == keep.shape[1]
