"""Reports belong to a conversation: to its outputs and its cache. A model's own is that of its last prefill."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hawk_compile
from hawk_compile.errors import HawkError
from tests import zoo
from tests.runtime.models import ROUNDING, fresh, generate, picture, plain, pruned
from tests.runtime.reference import decoder_inputs


def kept(source: Any) -> list[int]:
    return hawk_compile.report(source).keep_indices[0].tolist()


def test_a_prefill_of_another_thread_is_the_models_last() -> None:
    model = fresh("llava")
    thread = threading.Thread(target=lambda: generate(model, picture("llava"), 1))
    thread.start()
    thread.join()
    assert hawk_compile.report(model).visual_tokens.tolist() == [32]


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_each_output_and_cache_has_its_own(name: str) -> None:
    model, caches = pruned(name), [DynamicCache(), DynamicCache()]
    outs = [generate(model, picture(name, which), 2, past_key_values=cache)
            for which, cache in zip((2, 4), caches, strict=True)]
    text = generate(model, zoo.text_only(name, plain(name)), 2)
    forwards = [model(**picture(name, which)) for which in (2, 4)]
    bare = [model(**picture(name, which), use_cache=False) for which in (2, 4)]
    steps = [generate(model, picture(name, which), 3, use_cache=False) for which in (2, 4)]
    tuples = [model(**picture(name, which), return_dict=False) for which in (2, 4)]
    for i, which in enumerate((2, 4)):
        alone = fresh(name)
        alone(**picture(name, which))
        expected = kept(alone)
        for source in (outs[i], caches[i], outs[i].past_key_values, forwards[i], bare[i], steps[i], tuples[i]):
            assert kept(source) == expected
    assert hawk_compile.report(text).reason == "the prompt has no visual features"
    assert hawk_compile.report(text.past_key_values).prompt_tokens == hawk_compile.report(text).prompt_tokens


def test_placeholders_without_pictures_are_said() -> None:
    inputs = picture("llava")
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    reason = hawk_compile.report(generate(pruned("llava"), alone, 2)).reason
    assert reason == "the prompt holds placeholders of image tokens, but no image was given with it"


def test_embeddings_that_images_were_merged_into_are_said_to_stay_whole() -> None:
    """Of what the plain model answers; of a prompt of text given so it is said too, as nothing tells them apart."""
    model, inputs = fresh("llava"), picture("llava")
    merged = decoder_inputs(plain("llava"), inputs)["inputs_embeds"]
    with torch.no_grad(), pytest.warns(UserWarning, match="given inputs_embeds without .* give input_ids, and the"):
        out = model(inputs_embeds=merged)
    assert "images are merged into them" in str(hawk_compile.report(out).reason)
    with torch.no_grad():
        torch.testing.assert_close(out.logits, plain("llava")(**inputs).logits, **ROUNDING)


@torch.no_grad()
def test_a_part_runs_whole_and_reports_are_of_the_model_alone() -> None:
    model, inputs = fresh("llava"), picture("llava")
    model(**inputs)
    before = kept(model)
    alone = plain("llava")
    torch.testing.assert_close(model.model(**inputs)[0], alone.model(**inputs)[0], **ROUNDING)
    torch.testing.assert_close(type(model).forward(model, **inputs).logits, alone(**inputs).logits, **ROUNDING)
    assert kept(model) == before


def test_a_cache_keeps_its_report_through_beams_copies_and_crops() -> None:
    cache = DynamicCache()
    out = generate(pruned("llava"), picture("llava"), 4, num_beams=2, past_key_values=cache)
    assert kept(out) == kept(cache)
    twin = copy.deepcopy(cache)
    twin.crop(-1)
    generate(pruned("llava"), picture("llava", 2), 1)
    assert kept(twin) == kept(cache)
    cache.reset()
    with pytest.raises(HawkError, match="got a DynamicCache that none has: give the model"):
        hawk_compile.report(cache)
    assert kept(twin) == kept(out)


def test_what_no_prefill_made_has_no_report() -> None:
    with pytest.raises(HawkError, match="got a Tensor that none has: give the model"):
        hawk_compile.report(torch.zeros(1))
    for source in (plain("llava")(**picture("llava")), generate(plain("llava"), picture("llava"), 1)):
        with pytest.raises(HawkError, match="that none has: give the model"):
            hawk_compile.report(source)
