"""Small prefill graphs, captured by Dynamo, for tests of single passes."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hawk_compile.capture.dynamo import capture_settings
from hawk_compile.kernels.plan.op import slots

WIDTH, HEADS, HEAD_DIM, VOCABULARY, IMAGE = 16, 2, 8, 32, 31


class Decoder(nn.Module):
    """Embedding, merge, one attention block: as small as a graph with everything a pass looks for can be.

    Args:
        qk_norm: normalise queries and keys before position enters.
        norm_behind: and then behind it instead.
        own_positions: count positions inside instead of taking them.
        merges: number of masked_scatter in a row.
    """

    def __init__(
        self, qk_norm: bool = False, own_positions: bool = False, merges: int = 1, norm_behind: bool = False
    ):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.qk_norm = nn.LayerNorm(HEAD_DIM) if qk_norm else nn.Identity()
        self.has_qk_norm, self.own_positions, self.merges = qk_norm, own_positions, merges
        self.norm_behind = norm_behind

    def forward(self, ids: Tensor, features: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for merge in range(self.merges):
            part = features if self.merges == 1 else features[1 - merge :: 2]
            hidden = hidden.masked_scatter((ids == IMAGE - merge).unsqueeze(-1), part)
        if self.own_positions:
            positions = torch.arange(ids.shape[1]).unsqueeze(0)
        angle = (positions[:, None, :].float() / 10).transpose(1, 2)  # [B, S, 1]
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        normed = self.norm(hidden)
        query, key, value = (
            linear(normed).view(*ids.shape, HEADS, HEAD_DIM).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        if self.has_qk_norm and not self.norm_behind:
            query, key = self.qk_norm(query), self.qk_norm(key)
        query, key = query * cos + query.flip(-1) * sin, key * cos + key.flip(-1) * sin
        if self.has_qk_norm and self.norm_behind:
            query, key = self.qk_norm(query), self.qk_norm(key)
        slot = torch.arange(ids.shape[1])
        mask = (slot[None, :] <= slot[:, None]) & attention_mask[:, None, None, :].bool()
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return hidden + attended.transpose(1, 2).reshape(*ids.shape, WIDTH)


def planned(model: nn.Module) -> Callable[..., Any]:
    def call(inputs: tuple[Tensor, ...], plan: tuple[Tensor, ...]) -> Any:
        keep, valid, scores = torch.ops.hawk.plan(*plan)
        for given in (inputs[2], inputs[3]):
            torch._check(given.shape[1] == inputs[0].shape[1])
        return model(*inputs), keep, valid, scores

    return call


def prompt(rows: int = 1, length: int = 12, visual: int = 5, merges: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """(ids [B, S], features [B * visual, D], mask [B, S], positions [B, S]); visual tokens stand from position 2 on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY - 4, (rows, length), generator=generator)
    ids[:, 2 : 2 + visual] = IMAGE
    if merges == 2:
        ids[:, 2 : 2 + visual : 2] = IMAGE - 1
    features = torch.randn(rows * visual, WIDTH, generator=generator)
    return ids, features, torch.ones_like(ids), torch.arange(length).repeat(rows, 1)


def plan_of(inputs: tuple[Tensor, ...], kept: int) -> tuple[Tensor, ...]:
    """A plan that keeps `kept` visual tokens of each row; all text votes."""
    ids = inputs[0]
    visual = ids >= IMAGE - 1
    rows, length = ids.shape
    per_row = int(visual[0].sum())
    budget = torch.full((rows,), kept)
    device = torch.device("cpu")
    weights = torch.full((HEADS,), 1 / HEADS)
    torch._dynamo.mark_static(weights)
    return ~visual, budget, weights, *slots(length - per_row + kept, rows * kept, device)


def captured(function: Callable[..., Any], *args: Any, dynamic: bool = True) -> fx.GraphModule:
    """The graph that Dynamo makes of a call."""
    graphs: list[fx.GraphModule] = []

    def keep_graph(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    compiled = torch.compile(function, backend=keep_graph, dynamic=dynamic, fullgraph=True, isolate_recompiles=True)
    with torch.no_grad(), capture_settings():
        try:
            compiled(*args)
        except RuntimeError as error:
            # The plan's marker refuses to run; the graph has been taken by then.
            if "hawk::plan" not in str(error):
                raise
    return graphs[0]


def of_a_decoder(kept: int = 2) -> fx.GraphModule:
    """The planned graph of a `Decoder`, captured once; a copy of its own for each caller."""
    return copy.deepcopy(captured_once(kept))


@functools.cache
def captured_once(kept: int) -> fx.GraphModule:
    inputs = prompt()
    return captured(planned(Decoder()), inputs, plan_of(inputs, kept))
