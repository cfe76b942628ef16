"""Every selector in the graph, held to its ranking on the merged embeddings made by hand; a few through `optimize`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile import selectors
from hawk_compile.errors import ConfigError, GraphError
from hawk_compile.settings import rankings
from hawk_compile.settings.selectors import SELECTORS, register_selector, selector_named
from tests import eager_reference as reference
from tests import zoo
from tests.capture.rewritten import Rewritten
from tests.test_architectures import encoded, fresh
from tests.zoo import common, rows

NAME = "qwen2_5_vl"
RATIO = 0.6
RANKED = ("divprune", "idpruner", "cdpruner", "hawk_diverse", "dart", "qapruner", "norm", "random", "stride")


@functools.cache
def plain(name: str) -> Any:
    return zoo.build(name, layers=1)


def build(**settings: Any) -> Any:
    return hawk_compile.optimize(zoo.build(NAME, layers=1), ratio=RATIO, backend="eager", **settings)


def kept_by(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        model(**fresh(inputs))
    return hawk_compile.report(model)


def given_by_hand(
    inputs: dict[str, Any], query: str = "mean", name: str = NAME
) -> dict[str, Tensor]:
    """What a ranking may read, from the eager model."""
    model = plain(name)
    visual = zoo.visual_mask(name, model, inputs)
    embeddings = reference.merged_inputs(model, fresh(inputs))["inputs_embeds"]
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    votes = torch.tensor(reference.voters(inputs["input_ids"][0].tolist(), visual[0].tolist(), common.VISION_END, ends))
    if query == "last":
        votes = votes & (torch.arange(len(votes)) == votes.nonzero().max())
    with torch.no_grad():
        q, k = reference.first_layer_query_key(model, embeddings)
    heads = q.shape[1]
    score = reference.scores_of_each if query == "each" else reference.scores
    weights, scores = torch.full((heads,), 1 / heads), torch.zeros(visual.shape)
    scores[visual] = score(q[0], k[0], visual[0], votes, weights).float()
    budget = torch.tensor([hawk_compile.HawkConfig(ratio=RATIO).kept(int(visual.sum()))])
    text = votes[None]
    return {"scores": scores, "embeddings": embeddings, "visual_mask": visual, "question_mask": text, "budget": budget}


def positions(ranks: Tensor, given: dict[str, Tensor]) -> list[int]:
    """All text and the visual tokens that rank highest."""
    visual = given["visual_mask"][0]
    order = ranks[0].masked_fill(~visual, -torch.inf).argsort(descending=True, stable=True)
    best = torch.zeros_like(visual)
    best[order[: int(given["budget"])]] = True
    return (best | ~visual).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("selector", RANKED)
def test_what_is_kept_is_what_the_ranking_puts_first(selector: str) -> None:
    """At several sizes."""
    model = Rewritten(plain(NAME), ratio=RATIO, selector=selector)
    ranking = SELECTORS[selector].ranking
    assert ranking is not None
    for size in zoo.sizes(NAME)[1:4]:
        inputs = encoded(NAME, plain(NAME), size)
        given = given_by_hand(inputs, SELECTORS[selector].query)
        wanted = [name for name in inspect.signature(ranking).parameters if name in given]
        expected = ranking(**{name: given[name] for name in wanted})
        assert model(fresh(inputs)).keep_indices[0].tolist() == positions(expected, given)
    assert len(model.graphs) == 1


def test_heads_alike_and_the_last_text_token() -> None:
    model = build(selector="uniform", query="last")
    inputs = encoded(NAME, model, zoo.sizes(NAME)[2])
    given = given_by_hand(inputs, "last")
    found = kept_by(model, inputs)
    assert found.keep_indices[0].tolist() == positions(given["scores"], given)
    assert found.kept_visual_tokens.equal(given["budget"]) and found.head_weights == "uniform"


def test_fastv_is_softmax_attention_of_the_last_text_token() -> None:
    inputs = encoded(NAME, plain(NAME), zoo.sizes(NAME)[2])
    settings = {"head_weights": "uniform", "normalization": "softmax", "query": "last"}
    found, by_settings = (
        Rewritten(plain(NAME), ratio=RATIO, **each)(fresh(inputs)) for each in ({"selector": "fastv"}, settings)
    )
    assert found.scores.equal(by_settings.scores)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])  # without and with a norm of queries and keys
def test_every_voter_by_itself(name: str) -> None:
    model = Rewritten(plain(name), ratio=RATIO, query="each", normalization="softmax")
    for size in zoo.sizes(name)[1:3]:
        inputs = encoded(name, plain(name), size)
        given = given_by_hand(inputs, "each", name)
        found = model(fresh(inputs))
        assert (found.scores - given["scores"]).abs().max() < 1e-6
        assert found.keep_indices[0].tolist() == positions(given["scores"], given)


@pytest.mark.parametrize("selector", ["idpruner", "hawk_diverse", "random", "stride"])
def test_a_padded_batch_keeps_what_its_rows_keep(selector: str) -> None:
    model = Rewritten(plain(NAME), ratio=RATIO, selector=selector)
    one, other = zoo.sizes(NAME)[1], zoo.sizes(NAME)[4]
    batch = rows.encoded(plain(NAME), zoo.inputs(NAME, plain(NAME), rows=[one, other]))
    singles = [rows.row(plain(NAME), batch, row) for row in range(2)]
    together = model(fresh(batch))
    for row, single in enumerate(singles):
        alone = model(fresh(single))
        padding = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
        assert together.keep_indices[row].equal(alone.keep_indices[0] + padding)


def test_noise_depends_on_seed_and_prompt() -> None:
    first, second = torch.randn(2, 1, 500, 4, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(1, 500).bool()
    noise = rankings.random(first, seen)
    rounded = rankings.random(first * (1 + 1e-7), seen)  # as by another size of batch
    assert (noise == rounded).float().mean() > 0.99 and len(noise.unique()) > 490
    for embeddings, seed in ((first, 1), (second, 0), (first.roll(1, dims=1), 0)):
        other = rankings.random(embeddings, seen, seed=seed)
        assert not noise.equal(other)
        assert abs(float(torch.corrcoef(torch.cat([noise, other]))[0, 1])) < 0.15
    assert abs(float(torch.corrcoef(torch.cat([noise, torch.arange(500.0)[None]]))[0, 1])) < 0.15


def norm_of_embedding(embeddings: Tensor, *, power: float = 2.0) -> Tensor:
    return embeddings.float().norm(p=power, dim=2)


def test_a_selector_of_ones_own() -> None:
    model = build(selector=selectors.Ranking(norm_of_embedding, {"power": 1.0}))
    inputs = encoded(NAME, model, zoo.sizes(NAME)[2])
    given = given_by_hand(inputs)
    for options, selector in (({"power": 1.0}, None), ({}, norm_of_embedding)):
        if selector is not None:
            hawk_compile.optimize(model, ratio=RATIO, backend="eager", selector=selector)
        ranks = norm_of_embedding(given["embeddings"], **options)
        assert kept_by(model, inputs).keep_indices[0].tolist() == positions(ranks, given)


def test_an_object_is_the_method_of_its_name_with_its_options() -> None:
    """And the old spelling of it still works, with a warning at the line that has it."""
    model = build(selector=selectors.DART(pivots=1))
    inputs = encoded(NAME, model, zoo.sizes(NAME)[2])
    given = given_by_hand(inputs)
    found = kept_by(model, inputs).keep_indices[0].tolist()
    wanted = {name: given[name] for name in ("embeddings", "visual_mask", "question_mask")}
    assert found == positions(rankings.dart(**wanted, pivots=1), given) != positions(rankings.dart(**wanted), given)
    with pytest.warns(DeprecationWarning, match=r"give selector=selectors.DART\(pivots=1\)") as warned:
        config = hawk_compile.HawkConfig(selector="dart", selector_options={"pivots": 1})
    assert warned[0].filename == __file__
    assert config.selector == config.method == selectors.DART(pivots=1) and dataclasses.replace(config, ratio=0.5)


def test_registering_still_works_and_warns() -> None:
    try:
        with pytest.warns(DeprecationWarning, match="give selector=norm_of_embedding") as warned:
            register_selector("longest", norm_of_embedding)
        assert warned[0].filename == __file__
        config = hawk_compile.HawkConfig(selector="longest")
        assert config.method.ranking is norm_of_embedding and config.method.name == "longest"
        with pytest.raises(ConfigError, match="is that of another selector"):
            register_selector("longest", shorter)
    finally:
        del SELECTORS["longest"]


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=str)
def test_a_name_and_options_in_json_give_the_selector_back(selector: selectors.Selector) -> None:
    changed = {name: value + 1 for name, value in selector.options.items() if isinstance(value, int)}
    for made in (selector, dataclasses.replace(selector, **changed)):
        assert selector_named(made.name, json.loads(json.dumps(made.options))) == made
    assert (str(made) == selector.name) != bool(changed)
    assert getattr(selectors, type(selector).__name__)() == selector


def like_the_question(embeddings: Tensor, question_mask: Tensor) -> Tensor:
    text = (embeddings * question_mask.unsqueeze(2)).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(embeddings, text, dim=2)


def like_the_votes(embeddings: Tensor, votes: Tensor) -> Tensor:
    return like_the_question(embeddings, votes)


def test_the_question_has_its_former_name_for_one_release() -> None:
    model = build(selector=like_the_question)
    expected = kept_by(model, encoded(NAME, model, zoo.sizes(NAME)[2])).keep_indices[0]
    with pytest.warns(DeprecationWarning, match="like_the_votes reads votes.*name its parameter question_mask"):
        model = build(selector=like_the_votes)
    assert kept_by(model, encoded(NAME, model, zoo.sizes(NAME)[2])).keep_indices[0].equal(expected)
    with pytest.warns(DeprecationWarning), pytest.raises(ConfigError, match='question="own"'):
        hawk_compile.HawkConfig(selector=like_the_votes, question="own")


def one_number(scores: Tensor) -> Tensor:
    return scores.sum()


def shorter(scores: Tensor) -> Tensor:
    return scores[:, :-3]


def reads_pixels(pixel_values: Tensor) -> Tensor:
    return pixel_values


@pytest.mark.parametrize(("ranking", "message"), [
    (lambda scores: scores, "must be a function with a name"),
    (reads_pixels, "ranking reads_pixels reads pixel_values; there are scores, embeddings"),
])  # fmt: skip
def test_functions_that_are_no_rankings(ranking: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_selector("mine", ranking)
    assert "mine" not in SELECTORS
    with pytest.raises(ConfigError, match=message):
        selectors.Ranking(ranking)


def test_a_ranking_without_a_value_per_position() -> None:
    for ranking in (one_number, shorter):
        model = build(selector=ranking)
        with pytest.raises(GraphError, match=f"{ranking.__name__} must return a float tensor .* like `scores`"):
            kept_by(model, encoded(NAME, model, zoo.sizes(NAME)[2]))


@pytest.mark.parametrize("name", ["", "all", "unpruned", "a,b"])
def test_names_that_no_selector_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match="name must be an identifier other than all and unpruned"):
        register_selector(name, norm_of_embedding)


def dart(scores: Tensor) -> Tensor:
    return scores


def test_a_function_is_not_taken_for_the_method_of_its_name() -> None:
    with pytest.raises(ConfigError, match="'dart' is that of another selector"):
        hawk_compile.HawkConfig(selector=dart)
    assert selectors.Ranking(dart, name="mine").name == "mine"


def test_scores_of_each_voter_are_fp32_under_autocast() -> None:
    model = build(query="each")
    with torch.autocast("cpu", torch.bfloat16):
        report = kept_by(model, encoded(NAME, model, zoo.sizes(NAME)[2]))
    assert report.scores.dtype == torch.float32
    assert not report.scores.equal(report.scores.bfloat16().float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("settings", "message"), [
    ({"selector": "best"}, "selector must be one of hawk, uniform, hawk_each"),
    ({"selector": "hawk-diverse"}, "or a ranking function, got 'hawk-diverse': did you mean 'hawk_diverse'.$"),
    ({"query": "first"}, "query must be one of"),
    ({"selector": "dart", "selector_options": {"pivot": 2}}, "names 'pivot' for .* pivots: did you mean 'pivots'.$"),
    ({"selector_options": {"pivots": 2}}, "it has no options"),
    ({"selector_options": ["pivots"]}, "selector_options must map names to values"),
    ({"selector": "qapruner", "selector_options": {"bits": 1}}, r"must be in \[2, 16\], got 1"),
    ({"selector": "dart", "selector_options": {"pivots": 2.5}}, "must be of type int, got 2.5"),
    ({"selector": selectors.DART}, r"a selector of hawk_compile.selectors, such as selectors.DART\(pivots=8\)"),
    ({"selector": "uniform", "head_weights": [1.0] * 4}, "weights all heads alike"),
])  # fmt: skip
def test_settings_that_cannot_be_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: selectors.DART(pivots=0), r'pivots of selector "dart" must be in \[1, inf\], got 0'),
    (lambda: selectors.IDPruner(importance="1"), r'importance of selector "idpruner" must be of type float, got \'1\''),
    (lambda: selectors.Random(seed=True), "seed .* must be of type int, got True"),
    (lambda: selectors.Ranking(norm_of_embedding, {"powr": 2.0}), "options names 'powr' .*; its options are power"),
    (lambda: selectors.Ranking(norm_of_embedding, {"power": "2"}), "power .* must be of type float, got '2'"),
    (lambda: selectors.Ranking(norm_of_embedding, ["power"]), "options must map names to values"),
])  # fmt: skip
def test_selectors_that_cannot_be_right(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    assert selectors.IDPruner(importance=1) == selectors.IDPruner(importance=1.0)
    assert selectors.Ranking(norm_of_embedding, {"power": 1}).options == {"power": 1.0}
