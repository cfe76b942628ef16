"""Decoders of which some layers keep states in place of keys and values: the layer that scores, and every cache."""

from __future__ import annotations

import contextlib
import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.handover import first_with_keys
from hawk_compile.tools.calibration.calibrate import fingerprint
from hawk_compile.tools.inspection.inspect import inspect_model
from hawk_compile.tools.survey import oracle
from hawk_compile.tools.survey.checks import prefill
from hawk_compile.tools.survey.prompts import visual_of
from hawk_compile.tools.survey.tiny import build, prompt
from tests.tiny import tiny

SCORING = {
    "qwen3_5": 0, "qwen3_5.linear_first": 3, "qwen3_5.two_periods": 3, "qwen3_5_moe": 3, "lfm2_vl": 0,
    "lfm2_vl.conv_first": 2, "lfm3_vl": 2, "minicpmv4_6.linear_first": 3, "minicpmv4_7": 3, "nemotron_h_omni": 3,
    "glm5_next": 3, "mistral_large4": 0,
}  # fmt: skip
"""Tiny models -> the layer that scores."""
QUICK = ("qwen3_5", "lfm2_vl.conv_first")
CACHED = (pytest.param("qwen3_5.linear_first", marks=pytest.mark.slow), "lfm2_vl.conv_first")
"""Linear attention first, and a convolution."""
SETTINGS: dict[str, Any] = {"ratio": 0.5, "backend": "eager", "head_weights": "uniform"}
QUESTION = [60, 61, 62, 63]
ROUNDING = {"atol": 1e-4, "rtol": 1e-5}
"""Logits of magnitude 20 in fp32; a linear attention adds up other chunks than token by token."""


@cache
def plain(name: str) -> PreTrainedModel:
    return build(tiny(name))


@cache
def pruned(name: str) -> PreTrainedModel:
    return hawk_compile.optimize(build(tiny(name)), **SETTINGS)


@pytest.mark.parametrize("name", ["lfm2_vl.conv_first", "nemotron_h_omni", "llava.jamba"])
def test_a_hybrid_equals_the_plain_model_gathered_in_front_of_the_layer_that_scores(name: str) -> None:
    """Bit for bit. tests/tools/survey/test_types.py has all checks of every type."""
    prefill(tiny(name), build(tiny(name)))


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SCORING]
)
def test_a_report_says_which_layer_scored(name: str) -> None:
    with torch.no_grad():
        out = pruned(name)(**prompt(tiny(name), 1))
    assert hawk_compile.report(pruned(name)).scoring_layer == SCORING[name]
    own = [type(layer) for layer in DynamicCache(config=plain(name).config.get_text_config()).layers]
    assert [type(layer) for layer in out.past_key_values.layers] == own


def test_padded_rows_of_a_model_that_counts_blocks_by_slots_are_refused() -> None:
    model = hawk_compile.optimize(build(tiny("minimax_m3_vl")), **SETTINGS)
    inputs = prompt(tiny("minimax_m3_vl"), 2)
    inputs["attention_mask"][1, 0] = 0
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="what pads a row moves its blocks"):
        model(**inputs)


def test_a_graph_serves_prompts_of_any_number_of_chunks() -> None:
    """The chunked delta rule is one operator: prompts of 1 to 3 chunks of 64 are one compilation."""
    model = hawk_compile.optimize(build(tiny("qwen3_5.linear_first")), **SETTINGS)
    inputs = prompt(tiny("qwen3_5.linear_first"), 1)
    for more in (0, 70, 140):
        longer = {
            key: torch.nn.functional.pad(value, (0, more), value=0 if key == "mm_token_type_ids" else 1)
            if value.shape == inputs["input_ids"].shape else value
            for key, value in inputs.items()
        }  # fmt: skip
        with torch.no_grad():
            out = model(**longer)
            hawk_compile.optimize(model, **{**SETTINGS, "ratio": 0})
            whole = model(**longer).logits
            hawk_compile.restore(model)
            torch.testing.assert_close(whole, model(**longer).logits, atol=0, rtol=0)
            hawk_compile.optimize(model, **SETTINGS)
        assert out.logits.isfinite().all()
    assert model.__dict__["_hawk_runtime"].compilations == 1


def test_what_is_known_without_a_graph() -> None:
    """Inspection captures as many layers as the one that scores needs; a calibration is of that layer's heads."""
    found = inspect_model(plain("qwen3_5.linear_first"), image_tokens=40, text_tokens=20)
    assert found.scoring_layer == 3 == first_with_keys(plain("qwen3_5.linear_first"))
    assert "layers.3" in found.attention and "layers.3" in str(found.query_projection)
    before = fingerprint(model := build(tiny("lfm2_vl.conv_first")))
    layers = oracle.layers_of(model)
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.add_(1)
        assert fingerprint(model) == before
        for parameter in layers[SCORING["lfm2_vl.conv_first"]].parameters():
            parameter.add_(1)
    assert fingerprint(model) != before


def generate(model: Any, inputs: dict[str, Any], tokens: int = 5, **options: Any) -> Any:
    options = {"max_new_tokens": tokens, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def follow_up(inputs: dict[str, Any], out: Any) -> dict[str, Tensor]:
    """The conversation so far and a question, without pictures."""
    ids = torch.cat([out.sequences, torch.tensor(QUESTION).expand(len(out.sequences), -1)], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)}


def own_cache(name: str) -> DynamicCache:
    return DynamicCache(config=plain(name).config.get_text_config())


def by_hand(name: str, inputs: dict[str, Any], tokens: list[int]) -> Tensor:
    """Logits [n, vocabulary] behind the last prompt token and each of these tokens, the last QUESTION fed at once."""
    model, report = plain(name), hawk_compile.report(pruned(name))
    keep = report.keep_indices[0]
    output, held = oracle.pruned_forward(model, inputs, keep, visual_of(model, inputs), report.scoring_layer)
    places = oracle.positions_of_steps(model, inputs, tokens)
    logits, kept = [output.logits[0, -1:]], len(keep)
    pieces = [(each, 1) for each in range(len(tokens) - len(QUESTION))] + [(len(tokens) - len(QUESTION), len(QUESTION))]
    for start, count in pieces:
        kept += count

        def change(kwargs: dict[str, Any], start: int = start, count: int = count) -> dict[str, Any]:
            return {**kwargs, "position_ids": torch.cat(places[start : start + count], -1)}

        ids = torch.tensor([tokens[start : start + count]])
        with torch.no_grad(), oracle.changed(oracle.decoder_of(model), change):
            output = model(
                input_ids=ids, past_key_values=held, attention_mask=torch.ones(1, kept).long(), use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("name", CACHED)
def test_a_turn_of_text_on_the_same_cache_and_on_copies_of_it(name: str) -> None:
    inputs, held = prompt(tiny(name), 1), own_cache(name)
    out = generate(pruned(name), inputs, past_key_values=held)
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected = by_hand(name, inputs, [*answer, *QUESTION])
    torch.testing.assert_close(torch.cat(out.logits), expected[: len(answer)], **ROUNDING)
    twin = copy.deepcopy(held)
    for each in (held, twin):
        later = generate(pruned(name), follow_up(inputs, out), past_key_values=each)
        torch.testing.assert_close(later.logits[0][0], expected[-1], **ROUNDING)


def unequal_rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(two rows, of two images and of one, padded on the left; each of them alone)"""
    shares = {key: value.split(len(value) // 2) for key, value in prompt(tiny(name), 2).items()}
    whole = shares["input_ids"][0].shape
    words = {"input_ids": torch.tensor([[70, 71, 72]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    first, second, both = {}, {}, {}
    for key, (one, two) in shares.items():
        second[key] = two
        if one.shape == whole:  # along the prompt
            first[key] = torch.cat([one, two, words.get(key, torch.zeros(1, 3, dtype=torch.long))], 1)
            missing = first[key].shape[1] - two.shape[1]
            both[key] = torch.cat([first[key], torch.nn.functional.pad(two, (missing, 0))])
        else:
            first[key] = torch.cat([one, two])
            both[key] = torch.cat([one, two, two])
    return both, [first, second]


@pytest.mark.parametrize("name", CACHED)
def test_two_turns_of_rows_with_unequal_images_equal_each_row_alone(name: str) -> None:
    inputs, alone = unequal_rows(name)
    held = own_cache(name)
    out = generate(pruned(name), inputs, past_key_values=held)
    report = hawk_compile.report(pruned(name))
    assert report.visual_tokens[0] == 2 * report.visual_tokens[1] > 0
    later = generate(pruned(name), follow_up(inputs, out), past_key_values=held)
    for row, single in enumerate(alone):
        held = own_cache(name)
        expected = generate(pruned(name), single, past_key_values=held)
        torch.testing.assert_close(torch.stack(out.logits)[:, row], torch.cat(expected.logits), **ROUNDING)
        assert out.sequences[row, -5:].equal(expected.sequences[0, -5:])
        again = generate(pruned(name), follow_up(single, expected), past_key_values=held)
        torch.testing.assert_close(torch.stack(later.logits)[:, row], torch.cat(again.logits), **ROUNDING)


@pytest.mark.parametrize("name", CACHED)
def test_static_caches_and_plain_ones(name: str) -> None:
    """Whatever the cache's layers are: states are copied into a static one, and a plain one takes the layers."""
    inputs = prompt(tiny(name), 1)
    expected = generate(pruned(name), inputs)
    static = StaticCache(config=plain(name).config.get_text_config(), max_cache_len=128)
    kinds: list[dict[str, Any]] = [
        {"cache_implementation": "static"}, {"past_key_values": static}, {"past_key_values": DynamicCache()}]
    for options in kinds:
        out = generate(pruned(name), inputs, **options)
        torch.testing.assert_close(torch.cat(out.logits), torch.cat(expected.logits), **ROUNDING)
    static.reset()
    out = generate(pruned(name), inputs, past_key_values=static)
    torch.testing.assert_close(torch.cat(out.logits), torch.cat(expected.logits), **ROUNDING)


@pytest.mark.parametrize("name", CACHED)
def test_beams_are_those_of_a_batch_of_beams(name: str) -> None:
    """Two beams reorder states with keys: the best sequence has the score that feeding it gives."""
    inputs = prompt(tiny(name), 1)
    out = generate(pruned(name), inputs, num_beams=2, output_scores=True)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    with torch.no_grad():
        step = pruned(name)(**inputs, past_key_values=(held := own_cache(name)))
        total = 0.0
        for token in tokens:
            total += float(step.logits[0, -1].log_softmax(-1)[token])
            step = pruned(name)(input_ids=torch.tensor([[token]]), past_key_values=held)
    assert abs(total / len(tokens) - float(out.sequences_scores[0])) < 1e-4


def second_picture(name: str, held: Cache, answer: Tensor) -> dict[str, Any]:
    """Another picture and its question behind what a cache holds, all at positions of text."""
    inputs = prompt(tiny(name), [1])
    ids = torch.cat([answer, inputs["input_ids"]], 1)
    places = torch.arange(ids.shape[1])[None] + held.get_seq_length()
    pixels = {key: inputs[key] for key in inputs if key.startswith(("pixel", "image", "spatial"))}
    places = places.expand(4, 1, -1) if "image_grid_thw" in inputs else places
    return {"input_ids": ids, "position_ids": places, **pixels}


@pytest.mark.parametrize("name", CACHED)
def test_a_new_picture_on_a_cache_that_holds_states(name: str) -> None:
    model, layer = plain(name), SCORING[name]
    first, held = prompt(tiny(name), 1), own_cache(name)
    out = generate(pruned(name), first, past_key_values=held)
    kept = hawk_compile.report(pruned(name)).keep_indices[0]
    answer = out.sequences[:, first["input_ids"].shape[1] :]
    _, other = oracle.pruned_forward(model, first, kept, visual_of(model, first), layer)
    oracle.decode(model, first, other, answer[0, :-1].tolist(), len(kept))
    past = other.get_seq_length()
    second = second_picture(name, held, answer[:, -1:])
    with torch.no_grad():
        result = pruned(name)(**second, past_key_values=held)
    report = hawk_compile.report(pruned(name))
    assert report.kept_visual_tokens < report.visual_tokens
    expected = second_by_hand(model, second, other, past, report.keep_indices[0], layer)
    torch.testing.assert_close(result.logits, expected, **ROUNDING)


def second_by_hand(
    model: PreTrainedModel, inputs: dict[str, Any], held: Cache, past: int, keep: Tensor, layer: int
) -> Tensor:
    """Logits of the plain model behind a filled cache, with tokens removed in front of a layer."""
    length = inputs["input_ids"].shape[1]
    columns = torch.cat([torch.arange(past), past + keep])

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        mask = kwargs.pop("attention_mask", None)
        if isinstance(mask, Tensor):
            mask = mask[:, :, keep][..., columns] if mask.ndim == 4 else mask[:, keep]
        return oracle.gathered(kwargs, length, keep, torch.zeros(length, dtype=torch.bool)) | {"attention_mask": mask}

    def place(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "position_ids": inputs["position_ids"]}

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(oracle.changed(oracle.decoder_of(model), place))
        for part in oracle.layers_of(model)[layer:]:
            stack.enter_context(oracle.changed(part, change))
        whole = torch.ones(1, past + length, dtype=torch.long)
        return model(**inputs, past_key_values=held, attention_mask=whole).logits


@pytest.mark.parametrize("name", CACHED)
def test_new_pictures_in_unequal_rows_behind_states_are_refused(name: str) -> None:
    """What fills a row up would stand between a state and the new tokens."""
    inputs, _ = unequal_rows(name)
    same, held = prompt(tiny(name), 2), own_cache(name)
    with torch.no_grad():
        pruned(name)(**same, past_key_values=held)
        rows, length = inputs["input_ids"].shape
        places = (torch.arange(length) + held.get_seq_length()).expand(rows, -1)
        inputs["position_ids"] = places.expand(4, rows, -1) if "image_grid_thw" in inputs else places
        inputs["attention_mask"] = torch.cat([same["attention_mask"], inputs["attention_mask"]], 1)
        with pytest.raises(UnsupportedCallError, match="keep states, which what fills a row up"):
            pruned(name)(**inputs, past_key_values=held)
