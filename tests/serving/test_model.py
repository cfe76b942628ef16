"""What a served model keeps of an item, over a stand-in for vLLM's model; on CUDA without waiting for the device."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.errors import UnsupportedModelError
from hawk_compile.kernels.score.reference import score_projected
from hawk_compile.passes.insert_ranking import READABLE
from hawk_compile.serving.vllm import model as served_models
from hawk_compile.serving.vllm import positions
from hawk_compile.serving.vllm.compat import model as compat
from hawk_compile.serving.vllm.model import pruned_class
from hawk_compile.serving.vllm.positions import PLAIN
from hawk_compile.serving.vllm.scoring import Projections, ranked
from hawk_compile.settings.head_weights import HeadWeights
from tests.serving.test_items import IMAGE as VISUAL
from tests.serving.test_items import START, STOP, Feature, Range, pruned_item

WIDTH, HEADS, KV_HEADS, SIZE = 24, 4, 2, 8
IMAGE = 5
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Rotary(nn.Module):
    """As vLLM's, for 8 positions."""

    max_position_embeddings = 8

    def __init__(self, by_length: bool = False) -> None:
        super().__init__()
        self.by_length = by_length
        self.register_buffer("cos_sin_cache", self._compute_cos_sin_cache(), persistent=False)

    def _compute_cos_sin_cache(self) -> Tensor:
        rows = self.max_position_embeddings
        return torch.outer(torch.arange(rows), torch.ones(4)) / (rows if self.by_length else 1)

    def forward(self, *given: Any) -> None:
        raise AssertionError("scores are taken in front of positions")


class Kernel(nn.Module):
    """As vLLM's Attention."""

    num_heads, num_kv_heads = HEADS, KV_HEADS

    def get_kv_cache_spec(self) -> None: ...

    def forward(self, *given: Any) -> None:
        raise AssertionError("scores are taken in front of attention")


class Attention(nn.Module):
    num_heads, num_kv_heads = 2 * HEADS, 2 * KV_HEADS  # of two ranks, as some of vLLM's say

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(WIDTH, KV_HEADS * SIZE)
        self.rotary_emb, self.attn = Rotary(), Kernel()
        self.behind = nn.Identity()

    def forward(self, positions: Tensor, hidden_states: Tensor) -> None:
        query, key = self.rotary_emb(positions, self.q_proj(hidden_states), self.k_proj(hidden_states))
        query, key = (self.behind(each.unflatten(1, (-1, SIZE))).flatten(1) for each in (query, key))
        self.attn(query, key, hidden_states)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> None:
        self.attention(positions=positions, hidden_states=self.norm(hidden_states))


class Decoder(nn.Module):
    """As vLLM's, which are compiled when they are called first, unless they are told not to be."""

    do_not_compile = False

    def __init__(self) -> None:
        super().__init__()
        self.embed_input_ids = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList([Layer()])

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any, inputs_embeds: Tensor
    ) -> None:
        assert self.do_not_compile and input_ids is None and intermediate_tensors is None
        for layer in self.layers:
            layer(positions, self.front(positions, inputs_embeds), None)

    def front(self, positions: Tensor, hidden: Tensor) -> Tensor:
        return hidden


class Multiplied(Decoder):
    """Where it stands, as some do."""

    def front(self, positions: Tensor, hidden: Tensor) -> Tensor:
        hidden *= 0.001
        return hidden


class Learned(Decoder):
    """Position embeddings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, WIDTH)

    def front(self, positions: Tensor, hidden: Tensor) -> Tensor:
        return hidden + self.places(positions)


class Nested(Decoder):
    """Its layers are run by a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Multiplied()
        self.inner.layers = self.layers

    def forward(self, *args: Any, **given: Any) -> None:
        self.inner(*args, **given)


class Shared(Decoder):
    """Of two ranks, each has half of the tokens."""

    def front(self, positions: Tensor, hidden: Tensor) -> Tensor:
        return hidden[: len(hidden) // 2]


class Asking(Decoder):
    """Reads what an engine says of a step."""

    def front(self, positions: Tensor, hidden: Tensor) -> Tensor:
        raise AssertionError("no context")


class Model(nn.Module):
    """As vLLM's multimodal models: an encoder whose output is as wide as the decoder or, with deep features, wider."""

    kind: type[Decoder] = Decoder

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=WIDTH, num_attention_heads=HEADS)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.decoder_ = self.kind()

    def get_language_model(self) -> Decoder:
        return self.decoder_

    def embed_input_ids(self, ids: Tensor, features: Sequence[Tensor] = (), *, is_multimodal: Any = None) -> Tensor:
        rows = self.decoder_.embed_input_ids(ids)
        if len(features):
            rows = rows.detach().clone()
            rows[is_multimodal] = self.merged(torch.cat(list(features)))
        return rows

    def merged(self, features: Tensor) -> Tensor:
        return features

    def embed_multimodal(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(features)


class Changing(Model):
    """Text, and not what stands in the places of visual tokens."""

    def embed_input_ids(self, ids: Tensor, features: Sequence[Tensor] = (), *, is_multimodal: Any = None) -> Tensor:
        rows = super().embed_input_ids(ids, features, is_multimodal=is_multimodal)
        return rows if len(features) else 12 * rows


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compat, "weights_of_rank", lambda *_: HeadWeights(torch.tensor(WEIGHTS), "beside it"))
    for name in ("all_reduce", "from_first_rank"):
        monkeypatch.setattr(compat, name, lambda same: same)
    monkeypatch.setattr(compat, "lone_feature", lambda *_: None)
    monkeypatch.setattr(
        compat, "base_embeddings", lambda model: (model.get_language_model().embed_input_ids, model.embed_input_ids)
    )
    monkeypatch.setattr(served_models, "bound_encoder_calls", lambda *_: None)
    yield


def served(base: type = Model, plain: bool = True, **settings: Any) -> Any:
    section = list(PLAIN) if plain else None
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1), ec_transfer_config=None, lora_config=None,
        speculative_config=None,
        model_config=SimpleNamespace(
            model="", hf_config=SimpleNamespace(hawk={"ratio": 0.5, **settings}, mrope_section=section),
            multimodal_config=SimpleNamespace(mm_encoder_only=False), enable_prompt_embeds=False, max_model_len=8,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return pruned_class(base)(vllm_config=config)


def facts(question: list[int], keep: int, visual: list[bool], inner: list[int]) -> dict[str, list[Tensor]]:
    """What the processor sends with one item."""
    text = iter(inner)
    ids = [IMAGE if seen else next(text) for seen in visual]
    return {
        "hawk_question": [torch.tensor(question)], "hawk_keep": [torch.tensor(keep)],
        "hawk_visual": [torch.tensor(visual)], "hawk_ids": [torch.tensor(ids)],
    }  # fmt: skip


def best(model: Any, question: list[int], features: Tensor, keep: int, times: float = 1) -> list[int]:
    """By the definition of the scores; of embeddings that are multiplied in front of the first layer."""
    words = model.decoder_.embed_input_ids.weight[question]
    layer, hidden = model.decoder_.layers[0], torch.cat([words, features[:, :WIDTH]])
    normed = layer.norm(hidden * times)

    def by_head(projected: Tensor, heads: int) -> Tensor:
        return layer.attention.behind(projected.view(1, -1, heads, SIZE)).transpose(1, 2)

    visual = (torch.arange(len(hidden), device=DEVICE) >= len(question)).unsqueeze(0)
    query, key = by_head(layer.attention.q_proj(normed), HEADS), by_head(layer.attention.k_proj(normed), KV_HEADS)
    scores = score_projected(query, key, visual, ~visual, torch.tensor(WEIGHTS, device=DEVICE), "l2")
    return sorted(scores[0, len(question) :].topk(keep).indices.tolist())


@pytest.mark.parametrize("deep", [0, 2])
def test_the_best_rows_with_their_positions(deep: int) -> None:
    """Deep features stay with their rows, and take no part in the score."""
    model, question = served(), [3, 7, 9]
    features = torch.randn(12, WIDTH * (1 + deep), device=DEVICE)
    with torch.no_grad():
        (rows,) = model.embed_multimodal(features=[features], **facts(question, 5, [True] * 12, []))
        expected = best(model, question, features, 5)
    plain, axes, extent = positions.taken_apart(rows, torch.device("cpu"))
    assert plain.equal(features[expected]) and expected != list(range(5))
    assert axes.tolist() == [expected] * 3 and extent.tolist() == [12] * 5


def test_features_that_are_merged_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "merged", lambda self, features: 12 * features)
    with pytest.raises(UnsupportedModelError, match="does not put visual features as they leave the encoder"):
        served().probe()


def test_a_rule_for_positions_that_counts_on_an_end_of_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item by itself ends in one, too: its positions are asked for in front of any prompt."""

    def rule(model: Any, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
        assert len(tokens) > 12
        of_item = torch.arange(12) // 3
        return torch.cat([of_item, of_item.max() + 1 + torch.arange(len(tokens) - 12)]).expand(3, -1), 0

    monkeypatch.setattr(Model, "get_mrope_input_positions", rule, raising=False)
    model, features = served(), torch.randn(12, WIDTH, device=DEVICE)
    model.plain = False
    with torch.no_grad():
        (rows,) = model.embed_multimodal(features=[features], **facts([3, 7, 9], 5, [True] * 12, []))
        expected = best(model, [3, 7, 9], features, 5)
    _, axes, extent = positions.taken_apart(rows, torch.device("cpu"))
    assert axes.tolist() == [[place // 3 for place in expected]] * 3 and extent.tolist() == [4] * 5


def test_a_norm_behind_the_rotation_counts() -> None:
    model, question, features = served(), [3, 7, 9], torch.randn(12, WIDTH, device=DEVICE)
    without = best(model, question, features, 4)
    model.decoder_.layers[0].attention.behind = nn.LayerNorm(SIZE, elementwise_affine=False)
    with torch.no_grad():
        model.projections = Projections(model.decoder_, model.decoder_.layers[0], 1, HEADS, KV_HEADS)
        (rows,) = model.embed_multimodal(features=[features], **facts(question, 4, [True] * 12, []))
    _, axes, _ = positions.taken_apart(rows, torch.device("cpu"))
    assert axes[0].tolist() == best(model, question, features, 4) != without


def test_what_cannot_be_scored_is_refused_before_the_first_image() -> None:
    """An engine that does not measure memory with images runs the decoder alone before it serves."""
    model = served()
    model.decoder_.layers[0].attention.q_proj = nn.Linear(WIDTH, 2 * HEADS * SIZE)
    model.projections = Projections(model.decoder_, model.decoder_.layers[0], 1, HEADS, KV_HEADS)
    with pytest.raises(UnsupportedModelError, match="scored by heads of one size"):
        model.forward(None, torch.zeros(3, 2, dtype=torch.int64))


def with_decoder(kind: type[Decoder]) -> Any:
    return served(type("Model", (Model,), {"kind": kind}))


@pytest.mark.parametrize("kind", [Multiplied, Nested])
def test_what_a_decoder_does_in_front_of_its_first_layer_counts(kind: type[Decoder]) -> None:
    """The eps of a norm weighs more in embeddings that are multiplied by little: some of them otherwise than others."""
    model, question, features = with_decoder(kind), [3, 7, 9], torch.randn(40, WIDTH, device=DEVICE)
    features *= torch.logspace(-1, 1, 40, device=DEVICE).unsqueeze(1)
    before = features.clone()
    with torch.no_grad():
        (rows,) = model.embed_multimodal(features=[features], **facts(question, 15, [True] * 40, []))
        expected, without = (best(model, question, before, 15, times) for times in (0.001, 1))
    plain, axes, _ = positions.taken_apart(rows, torch.device("cpu"))
    assert axes[0].tolist() == expected != without
    assert plain.equal(before[expected]) and features.equal(before)
    assert not model.decoder_.do_not_compile, "the decoder itself is the engine's to compile"


def test_selectors_read_embeddings_as_the_encoder_makes_them() -> None:
    hidden = torch.randn(5, WIDTH, device=DEVICE)
    before = hidden.clone()
    with_decoder(Multiplied).projections(hidden)
    assert hidden.equal(before)


@pytest.mark.parametrize(("kind", "message"), [
    (Learned, "Learned adds positions to embeddings in front of its first attention"),
    (Shared, r"reads queries \(1, 32\) and keys \(1, 16\) of 2 tokens"),
    (Asking, r"does not get as far as its first attention with embeddings alone \(AssertionError: no context\)"),
])  # fmt: skip
def test_decoders_that_embeddings_alone_do_not_score_are_refused_as_soon_as_there_are_weights(
    kind: type[Decoder], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        with_decoder(kind).probe()


def test_text_that_is_changed_on_its_way_to_the_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="PrunedChanging changes embeddings of text on their way"):
        served(Changing).probe()


def test_text_between_visual_tokens_stays() -> None:
    model, question = served(), [3, 7]
    features = torch.randn(6, WIDTH, device=DEVICE)
    visual = [True, True, False, True, True, False, True, True]
    with torch.no_grad():
        (rows,) = model.embed_multimodal(features=[features], **facts(question, 2, visual, [11, 12]))
        first, second = best(model, question, features, 2)
        words = model.decoder_.embed_input_ids.weight[[11, 12]]
    plain, axes, extent = positions.taken_apart(rows, torch.device("cpu"))
    where = [place for place, seen in enumerate(visual) if seen]
    expected = {2: words[0], 5: words[1], where[first]: features[first], where[second]: features[second]}
    assert axes[0].tolist() == sorted(expected) and extent.tolist() == [8] * 4
    assert plain.equal(torch.stack([expected[place] for place in sorted(expected)]))


def test_an_item_without_any_embeddings() -> None:
    """It ends no engine."""
    empty, model = Feature(Range(1, 2, torch.zeros(2, dtype=torch.bool)), {}), served()
    known, delta = model.get_mrope_input_positions([50, START, STOP, 51], [empty])
    assert known[0].tolist() == [0, 1, 2, 3] and delta == 0 and not model.places


class Sized(Model):
    """Positions of an image by a size that travels under a name of its own."""

    def get_mrope_input_positions(self, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
        return torch.arange(len(tokens)).expand(3, -1) * (2 if "size" in features[0].data else 1), 0


def test_positions_by_what_does_not_travel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept would have the positions of another rule, and nothing would say so."""
    monkeypatch.setattr(compat, "lone_feature", lambda *_: SimpleNamespace(data={}))
    model, (ids, feature) = served(Sized, plain=False), pruned_item([START, *[VISUAL] * 6, STOP], 2, 2)
    known, delta = model.get_mrope_input_positions([50, 51, *ids, 52], [feature])
    assert known[0].tolist() == [0, 1, 2, 3, 4, 9, 10] and delta == 4 and model.places == {VISUAL}
    feature.data["size"] = SimpleNamespace(data=torch.tensor(1))
    with pytest.raises(UnsupportedModelError, match="PrunedSized gives an image or video other positions in a prompt"):
        model.get_mrope_input_positions([50, 51, *ids, 52], [feature])


def test_a_ranking_may_read_all_that_it_may_in_a_graph() -> None:
    def everything(
        scores: Tensor, embeddings: Tensor, visual_mask: Tensor, question_mask: Tensor, budget: Tensor
    ) -> Tensor:
        assert visual_mask.equal(~question_mask) and embeddings.shape == (1, *hidden.shape)
        return scores + budget

    assert set(inspect.signature(everything).parameters) == set(READABLE)
    hidden, scores, visual = torch.randn(5, WIDTH), torch.rand(1, 5), torch.arange(5).unsqueeze(0) > 1
    config: Any = SimpleNamespace(method=SimpleNamespace(ranking=everything, options={}))
    assert ranked(config, scores, hidden, visual, torch.tensor([2])).equal(scores + 2)


def test_positions_reach_as_far_as_a_whole_prompt_and_its_answer() -> None:
    rotary = served().decoder_.layers[0].attention.rotary_emb
    assert rotary.cos_sin_cache[:, 0].tolist() == list(range(16)) and rotary.max_position_embeddings == 16


def test_a_table_that_depends_on_its_length_is_refused() -> None:
    model = Model(vllm_config=None)
    model.decoder_.layers[0].attention.rotary_emb = Rotary(by_length=True)
    compat.let_positions_reach(model, 4, 4)
    with pytest.raises(UnsupportedModelError, match=r"a Rotary for 8 positions, .* max_model_len=4 or less"):
        compat.let_positions_reach(model, 5, 5)
    assert model.decoder_.layers[0].attention.rotary_emb.max_position_embeddings == 8


def test_head_weights_are_told_of_and_outlive_sleep(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM keeps a sleeping model's buffers, and loads its parameters anew."""
    with caplog.at_level(logging.INFO, "vllm.hawk"):
        model = served()
    assert caplog.messages == ["hawk: head weights: beside it"]
    assert dict(model.named_buffers())["hawk_head_weights"].tolist() == pytest.approx(WEIGHTS)
    assert not model.state_dict().keys() & {"hawk_head_weights"}


def test_encoders_of_several_widths() -> None:
    """Deep features of images, and audio that is as wide as the decoder, in either order."""
    model = served()
    image, audio = torch.randn(5, 3 * WIDTH, device=DEVICE), torch.randn(4, WIDTH, device=DEVICE)
    for features in (image, audio):
        model.embed_multimodal(features=[features])
    ids = torch.tensor([1, *[IMAGE] * 5, 2, *[IMAGE] * 4])
    model.places = {IMAGE}
    rows, *_ = model.recompute_mrope_positions(ids, [image, audio], torch.arange(11).expand(3, -1), 0)
    assert rows[0] is image and rows[1] is audio


def test_items_that_are_not_pruned_are_the_encoders_own() -> None:
    features = torch.randn(6, WIDTH, device=DEVICE)
    (rows,) = served().embed_multimodal(features=[features])
    assert rows is features


def test_another_number_of_features_than_placeholders() -> None:
    features = torch.randn(6, WIDTH, device=DEVICE)
    with pytest.raises(UnsupportedModelError, match="7 placeholders and 6 visual features"):
        served().embed_multimodal(features=[features], **facts([3], 2, [True] * 7, []))


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no other device here")
@pytest.mark.parametrize("selector", ["hawk", "hawk_each", "divprune", "norm"])
def test_nothing_waits_for_the_device(selector: str) -> None:
    model = served(selector=selector)
    given = facts([3, 7], 3, [True, True, False, True, True, True], [11])
    features = torch.randn(5, WIDTH, device=DEVICE)
    with torch.no_grad():
        model.embed_multimodal(features=[features], **given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.embed_multimodal(features=[features], **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
