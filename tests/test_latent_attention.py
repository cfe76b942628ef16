"""Latent attention (MLA) writes its keys into new memory, part by part: what is scored is those keys, and not that
memory as it was."""

import pytest
import torch
from torch.utils import deterministic
from transformers import DynamicCache

import hawk_compile
from tests import eager_reference as reference
from tests import zoo
from tests.test_architectures import difference, encoded, fresh
from tests.zoo import Row, common

NAME = "kimi_k25"


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch):
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_nothing_removed_is_the_plain_model():
    model = zoo.build(NAME)
    inputs = zoo.inputs(NAME, model, rows=[zoo.sizes(NAME)[2], zoo.sizes(NAME)[3]])
    with torch.no_grad():
        expected = model(**inputs).logits
        found = hawk_compile.optimize(model, ratio=0, backend="eager")(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert difference(found[real], expected[real]) == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_equal_calls_keep_the_same(backend):
    model = zoo.build(NAME, layers=2)
    inputs = encoded(NAME, model, zoo.sizes(NAME)[4])
    visual = zoo.visual_mask(NAME, model, inputs)[0]
    merged = reference.merged_inputs(model, fresh(inputs))["inputs_embeds"]
    model = hawk_compile.optimize(model, ratio=0.5, backend=backend, head_weights="uniform")
    with torch.no_grad():
        query, key = reference.first_layer_query_key(model, merged)
        reports = [(model(**fresh(inputs)), hawk_compile.report(model))[1] for _ in range(5)]
    keeps = [report.keep_indices[0].tolist() for report in reports]
    assert keeps == keeps[:1] * 5
    ids = inputs["input_ids"][0].tolist()
    votes = reference.voters(ids, visual.tolist(), common.VISION_END, {common.END_OF_TURN})
    uniform = torch.full((query.shape[1],), 1 / query.shape[1])
    scores = reference.scores(query[0], key[0], visual, torch.tensor(votes), uniform)
    torch.testing.assert_close(reports[0].scores[0, visual].double(), scores, atol=1e-5, rtol=1e-4)
    kept = int(reports[0].kept_visual_tokens)
    assert keeps[0] == reference.kept_positions(scores, visual, kept).tolist()
    query, key = reference.rotated_query_key(hawk_compile.restore(model), inputs)
    rotated = reference.scores(query[0], key[0], visual, torch.tensor(votes), uniform)
    assert keeps[0] != reference.kept_positions(rotated, visual, kept).tolist(), "position decides here"


@pytest.mark.slow
def test_a_new_image_on_a_filled_cache_is_scored_by_its_own_keys():
    """The latents of the first turn stand in front of its own; scores are those of the same image alone."""
    model = hawk_compile.optimize(zoo.build(NAME, layers=2), ratio=0.5, backend="eager", head_weights="uniform")
    first = zoo.inputs(NAME, model, rows=[Row(images=((4, 4),))])
    second = zoo.inputs(NAME, model, rows=[Row(images=((3, 5),), after=4)], seed=1)
    with torch.no_grad():
        model(**second)
        alone = hawk_compile.report(model)
        cache = DynamicCache(config=model.config.get_text_config())
        model(**first, past_key_values=cache)
        kept = hawk_compile.report(model).kept_tokens
        behind = torch.cat([torch.ones_like(first["attention_mask"]), second["attention_mask"]], dim=1)
        model(**second | {"attention_mask": behind}, past_key_values=cache)
    later = hawk_compile.report(model)
    torch.testing.assert_close(later.scores[:, -alone.scores.shape[1] :], alone.scores, atol=1e-6, rtol=1e-5)
    assert cache.layers[0].keys.shape[2] == kept + later.kept_tokens
