"""Heads of which a part rotates, and heads that are normed behind the rotation: what is kept is what the paper's score
keeps, worked out from what the layer's own projections and norms give."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hawk_compile
from hawk_compile.tools.survey.oracle import layers_of
from hawk_compile.tools.survey.prompts import visual_of
from hawk_compile.tools.survey.tiny import build, prompt, read
from tests import eager_reference
from tests.tiny import FOLDER


@dataclass(frozen=True)
class Heads:
    """Where a tiny model's queries and keys before position are had from.

    Attributes:
        rotary: what its rotary embedding is set to.
        made_by: the children of the attention whose outputs they are.
        normed_by: those that norm them, which the model has behind the rotation.
    """

    made_by: tuple[str, str]
    rotary: Mapping[str, Any] = field(default_factory=dict)
    normed_by: tuple[str, str] | None = None


HALF = {"partial_rotary_factor": 0.5}
PROJECTIONS = ("q_proj", "k_proj")
HEADS = {
    "glm4v": Heads(PROJECTIONS, HALF | {"mrope_section": [1, 1, 0]}),
    "glm4v_moe": Heads(PROJECTIONS, HALF | {"mrope_section": [1, 1]}),
    "qwen3_5.linear_first": Heads(("q_norm", "k_norm"), HALF),
    "fuyu": Heads(("q_layernorm", "k_layernorm"), HALF),
    "hunyuan_vl": Heads(PROJECTIONS, normed_by=("query_layernorm", "key_layernorm")),
    "llama4": Heads(PROJECTIONS, normed_by=("qk_norm", "qk_norm")),
}
SLOW = ("glm4v_moe", "fuyu", "llama4")


@contextlib.contextmanager
def outputs_of(module: nn.Module, names: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """What children of a module give in calls, in the order of their names: it is filled while this lasts."""
    seen: list[Tensor] = [torch.empty(0)] * len(names)
    with contextlib.ExitStack() as stack:
        for place, name in enumerate(names):
            def look(_: nn.Module, args: Any, output: Tensor, place: int = place) -> None:
                seen[place] = output

            stack.callback(getattr(module, name).register_forward_hook(look).remove)
        yield seen


def heads_of(projected: Tensor, length: int, width: int) -> Tensor:
    """[heads, S, d] of one row, from what a projection gives, [1, S, heads * d], or a norm, in any layout."""
    heads = projected.unflatten(-1, (-1, width)) if projected.ndim == 3 else projected
    return (heads if heads.shape[2] == length else heads.transpose(1, 2))[0]


def papers_score(query: Tensor, key: Tensor, visual: Tensor, question: Tensor, weights: Tensor) -> Tensor:
    """[V] in float64, head by head and token by token: query [H, S, d], key [Hkv, S, d], masks [S], weights [H]."""
    total = torch.zeros(int(visual.sum()), dtype=torch.float64)
    for head, weight in enumerate(weights.tolist()):
        own = key[head * len(key) // len(query)].double()
        asked = query[head, question].double()
        relevance = torch.stack([(asked @ own[place]).mean() / math.sqrt(own.shape[-1])
                                 for place in visual.nonzero()[:, 0]])  # fmt: skip
        total += weight * relevance / relevance.square().sum().sqrt()
    return total


def best(score: Tensor, visual: Tensor) -> list[int]:
    """All text and the better half of the visual tokens, in order."""
    places = visual.nonzero()[:, 0]
    chosen = places[score.topk(math.ceil(len(places) / 2)).indices]
    return sorted([*chosen.tolist(), *(~visual).nonzero()[:, 0].tolist()])


def tiny_model(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, prompt of one row): the rotary embedding as it is asked for, and gains of norms that are not all one."""
    tiny = read(FOLDER / f"{name}.json")
    text = tiny.config["text_config"]
    rotary = text["rope_parameters"] | HEADS[name].rotary
    tiny = replace(tiny, config=tiny.config | {"text_config": text | {"rope_parameters": rotary}})
    model = build(tiny)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part_name, parameter in model.named_parameters():
            if "self_attn" in part_name and "norm" in part_name:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return model, prompt(tiny, rows=1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HEADS]
)
def test_the_whole_head_is_scored_before_position(name: str) -> None:
    """And not as it attends, which would keep others."""
    model, inputs = tiny_model(name)
    visual = visual_of(model, inputs)
    question = torch.arange(len(visual)) > visual.nonzero()[-1, 0] + 1
    count = model.config.get_text_config().num_attention_heads
    weights = torch.arange(1.0, count + 1) / sum(range(1, count + 1))
    hawk_compile.optimize(model, ratio=0.5, backend="eager", head_weights=weights.tolist())
    with torch.no_grad():
        model(**inputs, question_mask=question[None].long())
        report = hawk_compile.report(model)
        hawk_compile.restore(model)
        attention = layers_of(model)[report.scoring_layer].self_attn
        with outputs_of(attention, HEADS[name].made_by) as made:
            attending = eager_reference.rotated_query_key(model, inputs)
        pair = [heads_of(each, len(visual), attention.head_dim) for each in made]
        if (norms := HEADS[name].normed_by) is not None:
            pair = [getattr(attention, norm)(each) for norm, each in zip(norms, pair, strict=True)]
    score = papers_score(*pair, visual, question, weights)
    torch.testing.assert_close(report.scores[0, visual].double(), score, atol=1e-6, rtol=1e-5)
    assert report.keep_indices[0].tolist() == best(score, visual)
    rotated = papers_score(*(each[0] for each in attending), visual, question, weights)
    assert best(rotated, visual) != best(score, visual)
