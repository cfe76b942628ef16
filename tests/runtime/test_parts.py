"""Models whose generate does not run their forward: a part of them does, and it is pruned all the same."""

from __future__ import annotations

import copy
import functools
import json
import operator
from typing import Any

import pytest
import torch
import transformers

import hawk_compile
from hawk_compile.errors import HawkError, InputError, UnsupportedCallError, UnsupportedModelError
from hawk_compile.runtime.parts import goes_around_forward
from hawk_compile.settings.checkpoint import checkpoint_of
from hawk_compile.tools.survey.checks import batches, generated, prefill, steps
from hawk_compile.tools.survey.tiny import build, prompt, spread_weights
from tests.tiny import tiny

SETTINGS: dict[str, Any] = {"ratio": 0.5, "backend": "eager", "head_weights": "uniform"}
TEXT_ALONE: dict[str, Any] = {"generation_mode": "text", "thinker_max_new_tokens": 4}
TALKER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "embedding_size": 32,
    "rope_parameters": {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 10000.0},
    "tts_text_end_token_id": 11, "tts_text_pad_token_id": 12, "tts_codec_start_token_id": 13,
    "tts_codec_end_token_id": 14, "tts_codec_pad_token_id": 15, "tts_codec_mask_token_id": 16,
}  # fmt: skip
TO_WAVE = {
    "dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "emb_dim": 16,
                   "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8] * 5, "enc_attention_channels": 4,
                   "enc_se_channels": 4, "num_embeds": 9, "mel_dim": 8, "look_ahead_layers": [0],
                   "look_backward_layers": [0]},
    "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 128},
}  # fmt: skip


def test_what_generate_runs():
    around = [transformers.Blip2ForConditionalGeneration, transformers.Qwen2_5OmniForConditionalGeneration]
    assert all(map(goes_around_forward, around))
    through = [transformers.LlavaForConditionalGeneration, transformers.GraniteSpeechForConditionalGeneration,
               transformers.JanusForConditionalGeneration]  # fmt: skip
    assert not any(map(goes_around_forward, through))


class NamesTheMixin(transformers.LlavaForConditionalGeneration):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return transformers.GenerationMixin.generate(self, *args, **kwargs)


class NamesAnother(transformers.LlavaForConditionalGeneration):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.language_model.generate(*args, **kwargs)


class GoesOnToOneAround(transformers.Blip2ForConditionalGeneration):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)


class IsThatOfTransformers(transformers.Blip2ForConditionalGeneration):
    generate = transformers.GenerationMixin.generate


class HasPartsOfOne(transformers.LlavaForConditionalGeneration):
    generate = functools.partialmethod(transformers.GenerationMixin.generate, max_new_tokens=3)


class CannotBeRead(transformers.LlavaForConditionalGeneration):
    generate: Any = operator.methodcaller("forward")


@pytest.mark.parametrize(
    ("kind", "around"),
    [(NamesTheMixin, False), (NamesAnother, True), (GoesOnToOneAround, True), (IsThatOfTransformers, False),
     (HasPartsOfOne, False), (CannotBeRead, True)],
)  # fmt: skip
def test_a_generate_is_followed_to_what_it_names(kind, around):
    assert goes_around_forward(kind) == around


@pytest.mark.parametrize("run", [prefill, steps, batches])
def test_a_language_model_that_generates_from_embeddings_is_pruned(run):
    """Its learned positions are those of the whole prompt."""
    run(tiny("blip-2"), build(tiny("blip-2")))


@pytest.fixture(scope="module")
def blip() -> Any:
    return hawk_compile.optimize(build(tiny("blip-2")), **SETTINGS)


def test_an_output_within_the_output_has_the_callers_cache(blip):
    cache = transformers.DynamicCache()
    inputs = prompt(tiny("blip-2"), rows=1)
    with torch.no_grad():
        output = blip(**inputs, past_key_values=cache, use_cache=True)
    assert output.language_model_outputs.past_key_values is cache
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] > cache.layers[0].keys.shape[-2]
    assert hawk_compile.report(cache).keep_indices[0].tolist() == hawk_compile.report(blip).keep_indices[0].tolist()


def test_the_language_model_alone_is_what_it_was(blip):
    plain = copy.deepcopy(build(tiny("blip-2"))).language_model
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(blip.language_model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))


def test_what_a_logits_processor_asks_while_the_language_model_generates(blip):
    """The language model by itself, with embeddings as many as the prompt's, and the whole model."""
    inputs = prompt(tiny("blip-2"), rows=1)
    embeds = torch.ones(1, inputs["input_ids"].shape[1], blip.language_model.config.hidden_size)

    @torch.no_grad()
    def ask() -> tuple[Any, ...]:
        return blip.language_model(inputs_embeds=embeds).logits, blip(**inputs).logits

    alone, found = ask(), []
    expected = blip.generate(**inputs, max_new_tokens=3)
    processor = lambda ids, scores: found.append(ask()) or scores  # noqa: E731
    assert blip.generate(**inputs, max_new_tokens=3, logits_processor=[processor]).equal(expected) and found
    for logits in found:
        assert all(map(torch.equal, logits, alone))


def test_images_without_ids_are_refused(blip):
    inputs = prompt(tiny("blip-2"), rows=1)
    with pytest.raises(UnsupportedCallError, match=r"without input_ids \[B, S\]"):
        blip.generate(pixel_values=inputs["pixel_values"])
    with pytest.raises(InputError, match=r"none of their placeholders \(\[4\]\) stands in input_ids"):
        blip.generate(pixel_values=inputs["pixel_values"], input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(UnsupportedCallError, match="does not run its language model on the prompt"):
        blip.generate(**inputs, prefill_chunk_size=4, max_new_tokens=2)


def test_a_language_model_that_is_an_encoder_decoder_is_refused():
    config = tiny("blip-2").config
    t5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    try:
        model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**{**config, "text_config": t5}))
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        pytest.skip("this transformers makes no BLIP-2 with an encoder-decoder of its own accord")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        hawk_compile.optimize(model, **SETTINGS)


def test_audio_that_is_added_to_tokens_of_text_is_refused():
    with torch.device("meta"):
        model = transformers.VoxtralRealtimeForConditionalGeneration(
            transformers.VoxtralRealtimeConfig(**tiny("voxtral_realtime").config))
    with pytest.raises(UnsupportedModelError, match=r"no id that waits for audio in its prompt \(audio_token_id\)"):
        hawk_compile.optimize(model, **SETTINGS, modalities=("audio",))


def omni() -> Any:
    thinker = tiny("qwen2_5_omni_thinker").config
    torch.manual_seed(0)
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker, talker_config=TALKER, token2wav_config=TO_WAVE, enable_audio_output=True)  # fmt: skip
    model = transformers.Qwen2_5OmniForConditionalGeneration(config).eval()
    spread_weights(model.thinker)
    model.thinker.generation_config.eos_token_id = None
    model.speaker_map = {"Chelsie": {"bos_token": 7, "cond": torch.zeros(1, 8), "ref_mel": torch.zeros(1, 8, 8)}}
    return model


@pytest.mark.slow
def test_a_whole_omni_model_is_inspected_as_its_part():
    inspected = hawk_compile.inspect(omni().config, image_tokens=64, text_tokens=20, layers=1)
    assert inspected.model == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert inspected.scoring_layer == 0


@pytest.mark.parametrize("tool", [hawk_compile.evaluate, hawk_compile.calibrate])
def test_a_whole_omni_model_is_let_in_at_tools(tool):
    """No further than to what it is asked, of which there is nothing."""
    with pytest.raises(InputError, match="sample"):
        tool(omni(), None, [])


@pytest.mark.slow
def test_a_whole_omni_model_without_a_talker_makes_text():
    thinker, given = tiny("qwen3_omni_moe_thinker"), prompt(tiny("qwen3_omni_moe_thinker"), rows=1)
    torch.manual_seed(0)
    model = transformers.Qwen3OmniMoeForConditionalGeneration(
        transformers.Qwen3OmniMoeConfig(thinker_config=thinker.config, enable_audio_output=False)).eval()
    spread_weights(model.thinker)
    asked = {"thinker_max_new_tokens": 4, "thinker_eos_token_id": None}
    plain = model.generate(**given, **asked)
    hawk_compile.optimize(model, **{**SETTINGS, "ratio": 0.0})
    assert torch.equal(model.generate(**given, **asked), plain)
    hawk_compile.optimize(model, **SETTINGS)
    pruned = model.generate(**given, **asked)
    report = hawk_compile.report(model)
    assert report.kept_visual_tokens.item() == report.visual_tokens.item() // 2
    hawk_compile.restore(model)
    alone = hawk_compile.optimize(model.thinker, **SETTINGS)
    assert torch.equal(pruned, alone.generate(**given, max_new_tokens=4, eos_token_id=None))


@pytest.fixture(scope="module")
def omni_prompt() -> dict[str, Any]:
    return prompt(tiny("qwen2_5_omni_thinker"), rows=1)


def test_a_whole_omni_model_generates_text_as_its_part_does(omni_prompt):
    """Optimised, asked for its report, restored as a whole."""
    model = omni()
    plain = model.generate(**omni_prompt, **TEXT_ALONE)
    assert hawk_compile.optimize(model, **{**SETTINGS, "ratio": 0.0}) is model
    assert torch.equal(model.generate(**omni_prompt, **TEXT_ALONE), plain)
    hawk_compile.optimize(model, **SETTINGS)
    pruned = model.generate(**omni_prompt, **TEXT_ALONE)
    report = hawk_compile.report(model)
    assert report.kept_visual_tokens.item() == report.visual_tokens.item() // 2
    alone = hawk_compile.optimize(omni().thinker, **SETTINGS)
    assert torch.equal(pruned, alone.generate(**omni_prompt, max_new_tokens=4))
    hawk_compile.restore(model)
    assert not {name for part in (model, model.thinker) for name in vars(part) if name in ("generate", "forward")}
    assert torch.equal(model.generate(**omni_prompt, **TEXT_ALONE), plain)
    with pytest.raises(HawkError, match="needs an optimised model"):
        hawk_compile.report(model)


def test_a_saved_omni_model_prunes_alike_when_it_is_loaded_again(omni_prompt, tmp_path):
    """By the weights that lie beside it, and by the chat template that lies there."""
    weights = [5.0, 1.0, 0.0, 2.0]
    model = hawk_compile.optimize(omni(), **{**SETTINGS, "head_weights": weights})
    model.save_pretrained(tmp_path)
    expected = json.loads((tmp_path / "head_weights.json").read_text())
    assert expected["weights"] == [each / sum(weights) for each in weights]
    hawk_compile.restore(model)
    assert "save_pretrained" not in vars(model)
    torch.save({}, tmp_path / "spk_dict.pt")  # its voices, which the class wants there
    again = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(tmp_path)
    hawk_compile.optimize(again, **{**SETTINGS, "head_weights": "auto"})
    runtime = again.thinker._hawk_runtime
    assert runtime.head_weights.values.tolist() == expected["weights"]
    assert checkpoint_of(again.thinker) == str(tmp_path)


def test_a_block_around_a_whole_omni_model(omni_prompt):
    model = omni()
    with hawk_compile.pruned(model, **SETTINGS):
        model.generate(**omni_prompt, **TEXT_ALONE)
        assert hawk_compile.report(model).kept_tokens < omni_prompt["input_ids"].shape[1]
        with pytest.raises(UnsupportedCallError, match='generation_mode="text"'):
            model.generate(**omni_prompt, thinker_max_new_tokens=4)
    assert "generate" not in vars(model)
    assert "forward" not in vars(model.thinker)


def test_speech_is_refused_where_images_are_pruned_and_made_where_there_are_none(omni_prompt, monkeypatch):
    model = hawk_compile.optimize(omni(), **SETTINGS)
    with pytest.raises(UnsupportedCallError, match="makes speech from the hidden states of every token"):
        model.generate(**omni_prompt, thinker_max_new_tokens=4)
    asked = generated(model.thinker, omni_prompt)  # of the part itself everything can be asked
    assert hawk_compile.report(asked).kept_tokens < omni_prompt["input_ids"].shape[1]
    spoken = []
    monkeypatch.setattr(model.talker, "generate", lambda **kwargs: spoken.append(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(input_ids=omni_prompt["input_ids"][:, :5], thinker_max_new_tokens=4)
    assert spoken[0]["inputs_embeds"].shape[1] == 5 + 2
