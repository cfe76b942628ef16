"""What cannot run is refused by name, before anything runs or changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import ModelOutput

import hawk_compile
from hawk_compile.errors import ConfigError, HawkError, HeadWeightsError, InputError, UnsupportedCallError
from hawk_compile.errors import UnsupportedModelError as ModelError
from hawk_compile.runtime.gradients import refuse_gradients
from hawk_compile.runtime.handover import fill_cache
from hawk_compile.tools.survey.tiny import read
from tests import zoo
from tests.runtime.models import ROUNDING, conversation, fresh, generate, picture, plain, prompt, pruned
from tests.runtime.test_optimize import state
from tests.tiny import FOLDER
from tests.zoo import Row, common


def refused(model: Any, error: type[Exception], match: str, *args: Any, **settings: Any) -> None:
    before = state(model) if hasattr(model, "base_model") else dict(vars(model))
    with pytest.raises(error, match=match):
        hawk_compile.optimize(model, *args, **settings)
    assert (state(model) if hasattr(model, "base_model") else dict(vars(model))) == before


RULE = "ratio is the fraction of visual tokens removed and must be a number in"


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"ratio": 1}, ConfigError, RULE + ".*got 1; give a number such as 0.8$"),
    ({"ratio": 1.0}, ConfigError, RULE + ".*got 1.0"),
    ({"ratio": -0.1}, ConfigError, RULE + ".*got -0.1"),
    ({"ratio": 80}, ConfigError, RULE + ".*got 80; to remove 80 %, give 0.8"),
    ({"ratio": float("nan")}, ConfigError, RULE + ".*got nan"),
    ({"ratio": float("inf")}, ConfigError, RULE + ".*got inf"),
    ({"ratio": "0.8"}, ConfigError, RULE + ".*got '0.8'; give a number such as 0.8$"),
    ({"ratio": True}, ConfigError, RULE + ".*got True"),
    ({"ratio": None}, ConfigError, RULE + ".*got None"),
    ({"normalization": "L2"}, ConfigError, "one of l2, softmax, minmax, got 'L2': did you mean 'l2'.$"),
    ({"backend": "cudagraphs"}, ConfigError, "backend must be one of inductor, aot_eager, eager, got 'cudagraphs'$"),
    ({"compile_decode": 1}, ConfigError, "compile_decode must be True or False, got 1"),
    ({"end_of_turn_token_id": "<|im_end|>"}, ConfigError, "tuple of ids or None, got '<.im_end.>'; tokenizer.convert"),
    ({"vision_end_token_id": (3,)}, ConfigError, r"an id \(int\) or None, got \(3,\)"),
    ({"rato": 0.5}, ConfigError, "unknown setting rato; the settings are ratio.*: did you mean 'ratio'.$"),
    ({"head_weights": [0.5, 0.5]}, HeadWeightsError, r"must be 4 finite numbers .* got shape \(2,\)"),
    ({"head_weights": torch.ones(2, 2)}, HeadWeightsError, r"got shape \(2, 2\)"),
    ({"head_weights": torch.tensor(1.0)}, HeadWeightsError, r"must have shape \[H\].* got shape \(\)"),
    ({"head_weights": [1, 1, 1, -1]}, HeadWeightsError, "got the negative weight -1"),
    ({"head_weights": [0, 0, 0, 0]}, HeadWeightsError, 'all are 0 .*"uniform" weighs all heads equally'),
    ({"head_weights": [1, 1, 1, float("nan")]}, HeadWeightsError, "finite numbers .* got .*nan"),
    ({"head_weights": [1, 1, 1, float("inf")]}, HeadWeightsError, "finite numbers .* got .*inf"),
    ({"head_weights": ["a", "b", "c", "d"]}, HeadWeightsError, "a path, a tensor or numbers, got list"),
    ({"head_weights": 3}, HeadWeightsError, "a path, a tensor or numbers, got int"),
    ({"head_weights": "nowhere.json"}, HeadWeightsError, "there is no file nowhere.json"),
])  # fmt: skip
def test_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    refused(plain("llava"), error, match, **settings)


def test_config_and_settings() -> None:
    refused(plain("llava"), ConfigError, "either a config or single settings", hawk_compile.HawkConfig(), ratio=0.5)
    refused(plain("llava"), ConfigError, "got float; give single settings by name, as ratio=0.5$", 0.5)


@pytest.mark.parametrize(("name", "content", "match"), [
    ("a.json", "not json", "is no JSON"),
    ("a.json", "{}", 'has no "weights"'),
    ("a.json", '{"weights": "high"}', "holds 'high', which is no list of numbers"),
    ("a.json", '{"weights": [1, 2, null, 4]}', "which is no list of numbers"),
    ("a.json", "[1, 2, 3]", r"got shape \(3,\)"),
])  # fmt: skip
def test_head_weight_files(tmp_path: Path, name: str, content: str, match: str) -> None:
    (tmp_path / name).write_text(content)
    refused(plain("llava"), HeadWeightsError, match, head_weights=tmp_path / name)


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    save_file({"bias": torch.ones(4)}, tmp_path / "w.safetensors")
    path = tmp_path / "w.safetensors"
    refused(plain("llava"), HeadWeightsError, "holds no tensor 'weights' but bias", head_weights=path)
    (tmp_path / "x.safetensors").write_bytes(b"not a safetensors file")
    refused(plain("llava"), HeadWeightsError, "is not a safetensors file", head_weights=tmp_path / "x.safetensors")


def test_head_weight_files_that_fit(tmp_path: Path) -> None:
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4])
    (tmp_path / "a.json").write_text(json.dumps({"weights": [1, 2, 3, 4]}))
    save_file({"weights": torch.tensor([2.0, 4, 6, 8])}, tmp_path / "w.safetensors")
    for given in (tmp_path / "a.json", str(tmp_path / "w.safetensors"), wanted, (1, 2, 3, 4)):
        model = fresh("llava", head_weights=given)
        torch.testing.assert_close(model._hawk_runtime.head_weights.values, wanted)


TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4}


def florence() -> Any:
    return Florence2ForConditionalGeneration(Florence2Config(
        text_config={"model_type": "bart", "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                     "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
                     "decoder_ffn_dim": 32},
        vision_config={"embed_dim": [16, 32, 32, 32], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4,
                       "projection_dim": 32}))


@pytest.mark.parametrize(("make", "match"), [
    (lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), "LlamaForCausalLM takes no images, .*; give a model that holds"),
    (lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)), "CLIPVisionModel takes no images|cannot generate"),
    (lambda: plain("llava").base_model.vision_tower, "cannot generate|takes no images, videos or audio"),
    (lambda: plain("llava").base_model, "LlavaModel cannot generate"),
    (florence, "Florence2ForConditionalGeneration is an encoder-decoder"),
    (lambda: BlipForConditionalGeneration(BlipConfig(text_config=TEXT, vision_config=TOWER)), "Blip"),
    (lambda: torch.nn.Linear(2, 2), "must be a transformers.PreTrainedModel or hold one, got Linear"),
])  # fmt: skip
def test_models(make: Callable[[], Any], match: str) -> None:
    refused(make(), ModelError, match)


@pytest.mark.parametrize(("name", "match"), [
    ("mllama", r"images, which its decoder reads through cross-attention \(model.language_model.layers.1\): none"),
    ("idefics", r"images, which its decoder reads through cross-attention \(model.gated_cross_attn_layers\): none"),
    ("blip", r"takes images, which its decoder reads through cross-attention \(text_decoder.*crossattention\): none"),
    ("evolla", r"what it takes beside text through cross-attention \(model.layers.0.adapter\): none"),
    ("git", r"takes images, but its forward .* \(mm_encoder_outputs\), and no id in its prompt says where"),
    ("kosmos-2", r"takes images, but its forward .* \(mm_encoder_outputs\), and no id .* a mask beside the prompt"),
    ("diffusion_gemma", "takes images, which it reads with the prompt in an encoder"),
    ("pi0", "takes images, but cannot generate text"),
    ("mistral4", "takes no images, videos or audio, so it has no visual tokens to prune"),
])  # fmt: skip
def test_why_nothing_merges(name: str, match: str) -> None:
    """Said of the model itself: what it does with pictures in place of holding them in its prompt."""
    tiny = read(FOLDER / f"{name}.json")
    with torch.device("meta"):
        config = getattr(transformers, tiny.config_class)(**tiny.config)
        model = getattr(transformers, tiny.model_class)(config).eval()
    refused(model, ModelError, match)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_features_and_placeholders_differ(name: str) -> None:
    one, two = picture(name, 0), prompt(name, Row(images=zoo.sizes(name)[0].images * 2))
    visual = zoo.visual_mask(name, plain(name), one)
    fewer = one["input_ids"].masked_fill(visual & (visual.cumsum(1) == 1), common.FIRST_TEXT)
    more = torch.cat([two["input_ids"][:, :3], torch.full((1, 1), common.IMAGE), two["input_ids"][:, 3:]], 1)
    for inputs, ids in ((one, fewer), (two, more)):
        broken = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image_", "batch_"))}
        kept = torch.arange(ids.shape[1]).expand(3, 1, -1) if name in MROPE else torch.arange(ids.shape[1])[None]
        with pytest.raises(InputError, match=r"has \d+ placeholders .* but \d+ visual features were encoded: give the"):
            pruned(name)(input_ids=ids, position_ids=kept, **broken)


MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")


def call(match: str, error: type[Exception] = UnsupportedCallError, name: str = "llava", **arguments: Any) -> None:
    inputs = picture(name) | arguments
    with pytest.raises(error, match=match):
        pruned(name)(**inputs)
    check = generate(pruned(name), picture(name), 1)  # and the model goes on
    torch.testing.assert_close(check.logits[0][0], conversation(name, picture(name)).logits[-1], **ROUNDING)


def test_calls() -> None:
    ids = picture("llava")["input_ids"]
    length = ids.shape[1]
    call("labels were given to a pruned prefill.*restore", labels=ids)
    call("output_attentions=True needs attention matrices", output_attentions=True)
    call(r"attention_mask must have shape \[B, S\] .* got \(1, 1, ", attention_mask=torch.ones(1, 1, length, length))
    call("attention_mask must have shape .* got dict", attention_mask={"full_attention": None})
    call("attention_mask must have shape .* got", InputError, attention_mask=torch.ones(1, length + 3).long())
    call(r"logits_to_keep asks for the logits of visual tokens \(\[\d+\] of row 0\)", logits_to_keep=[1, length // 2])
    short = torch.ones(1, 3).long()
    call("must cover the whole conversation", InputError, past_key_values=filled(), attention_mask=short)


def test_what_is_no_prompt_and_no_cache() -> None:
    inputs = picture("llava")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for match, error, arguments in (
        (r"input_ids must be a tensor of integers \[B, S\], got list: give", InputError, {"input_ids": ids.tolist()}),
        (r"input_ids must be .* got torch.int64 \(\d+,\)", InputError, {"input_ids": ids[0]}),
        (r"input_ids must be .* got torch.float32", InputError, {"input_ids": ids.float()}),
        ("attention_mask must have a row for each of the 1 pr", InputError, {"attention_mask": mask.expand(2, -1)}),
        (r"position_ids must be \[B, S\].* got torch.int64 \(3,\)", InputError, {"position_ids": torch.arange(3)}),
        ("past_key_values must be a cache .* got tuple", UnsupportedCallError, {"past_key_values": ((1, 2),)}),
    ):
        with pytest.raises(error, match=match):
            pruned("llava")(**{**inputs, **arguments})


def test_what_is_no_model_no_path_and_no_inputs(tmp_path: Path) -> None:
    for error, match, function, *arguments in (
        (ModelError, "model must be a model that optimize takes, got NoneType", hawk_compile.restore, None),
        (InputError, "path must be a path, a text .* got int", hawk_compile.load, 3),
        (InputError, "path must be .* got NoneType", hawk_compile.export, plain("llava"), picture("llava"), None),
        (InputError, "inputs must be a mapping .* got Tensor", hawk_compile.export, plain("llava"),
         picture("llava")["input_ids"], tmp_path / "out"),
        (InputError, "source must be a path, .* got int", hawk_compile.bench, 3),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            function(*arguments)
    with pytest.raises(InputError, match="image_tokens must be a whole number of at least 2, got 'many'"):
        hawk_compile.inspect(plain("llava"), image_tokens="many")
    assert not list(tmp_path.iterdir())


def filled() -> DynamicCache:
    cache = DynamicCache()
    generate(pruned("llava"), zoo.text_only("llava", plain("llava")), 1, past_key_values=cache)
    return cache


def test_training() -> None:
    model = fresh("llava")
    model.train()
    with pytest.raises(UnsupportedCallError, match=r"training mode.*model.eval"):
        model(**picture("llava"))
    model.eval()
    logits = model(**picture("llava")).logits
    with pytest.raises(UnsupportedCallError, match="gradients were asked of a pruned prefill"):
        logits.sum().backward()
    with pytest.raises(UnsupportedCallError, match="gradients were asked of a pruned prefill"):
        model(**picture("llava"), output_hidden_states=True).hidden_states[-1].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert not model(**picture("llava")).logits.requires_grad


def test_gradients_of_chosen_hidden_states() -> None:
    """Of layers that were not asked for transformers gives None."""
    result = ModelOutput(logits=torch.ones(1, 2, 3), hidden_states=(None, torch.ones(1, 2, 4)))
    refuse_gradients(result)
    assert result.hidden_states[0] is None
    with pytest.raises(UnsupportedCallError, match="gradients were asked of a pruned prefill"):
        result.hidden_states[1].sum().backward()


def test_prompts_packed_into_one_row() -> None:
    """Their positions begin anew, which tells prompts apart only where there is neither a mask nor a cache."""
    for name, axes in (("llava", 0), ("qwen2_5_vl", 4)):
        inputs = {key: value for key, value in picture(name).items() if key != "attention_mask"}
        length = inputs["input_ids"].shape[1]
        places = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
        places = places.expand(axes, -1, -1) if axes else places
        with pytest.raises(UnsupportedCallError, match=r"position_ids that begin anew .* give each a row of its own"):
            pruned(name)(**inputs, position_ids=places, use_cache=False)
        straight = torch.arange(length).expand(axes or 1, 1, -1) if axes else torch.arange(length)[None]
        for given, cached in ((places, True), (straight, False)):
            assert pruned(name)(**inputs, position_ids=given, use_cache=cached).logits.isfinite().all()
    call("cu_seq_lens_q and cu_seq_lens_k were given", cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=[0, 4])


def test_ids_and_embeddings_at_once() -> None:
    inputs = picture("llava")
    embeds = plain("llava").get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match=r"either input_ids .* or inputs_embeds .* got both"):
        pruned("llava")(**inputs, inputs_embeds=embeds)
    with pytest.raises(InputError, match="got neither"):
        pruned("llava")(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_row_without_text(name: str) -> None:
    """Nothing could score its image."""
    inputs = picture(name)
    visual = zoo.visual_mask(name, plain(name), inputs)
    cut = {key: value[visual][None] for key, value in inputs.items() if key in ("input_ids", "mm_token_type_ids")}
    pixels = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image_"))}
    with pytest.raises(InputError, match=r"row 0 of the prompt has .* and no text token that could score them: add a"):
        pruned(name)(**cut, **pixels)
    with torch.no_grad():
        assert torch.equal(pruned(name, ratio=0.0)(**cut, **pixels).logits, plain(name)(**cut, **pixels).logits)


@pytest.mark.parametrize(("options", "match"), [
    ({"output_attentions": True}, "output_attentions=True needs attention matrices"),
])  # fmt: skip
def test_generate(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedCallError, match=match):
        generate(pruned("llava"), picture("llava"), 4, **options)
    assert generate(pruned("llava"), picture("llava"), 1).sequences.shape[0] == 1


def test_prompts_of_text_are_drafted_and_cut_by_generate() -> None:
    for name in ("llava", "qwen2_5_vl"):
        text = zoo.text_only(name, plain(name))
        for options in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
            out, expected = generate(pruned(name), text, 6, **options), generate(plain(name), text, 6, **options)
            assert out.sequences.equal(expected.sequences)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), **ROUNDING)


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_new_image_on_a_cache_where_images_attend_both_ways(name: str) -> None:
    cache = DynamicCache()
    generate(pruned(name), picture(name), 2, past_key_values=cache)
    held = [layer.keys.clone() for layer in cache.layers]
    inputs = {key: value for key, value in picture(name).items() if key != "attention_mask"}
    with pytest.raises(UnsupportedCallError, match="cannot attend both ways"):
        pruned(name)(**inputs, past_key_values=cache)
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, held, strict=True))


def test_a_pass_that_is_needed_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at the first prompt, of which nothing stays; without the switch the same model prunes."""
    model = fresh("llava")
    monkeypatch.setenv("HAWK_DISABLE", "insert_scoring")
    with torch.no_grad(), pytest.raises(ConfigError, match=r"^HAWK_DISABLE names 'insert_scoring', without which this"):
        model(**picture("llava"))
    monkeypatch.delenv("HAWK_DISABLE")
    with torch.no_grad():
        assert torch.equal(model(**picture("llava")).logits, pruned("llava")(**picture("llava")).logits)


def test_layers_that_hold_other_numbers_of_keys() -> None:
    """Attention that the passes do not see stands in front of the one that scored."""
    scratch, target = DynamicCache(), DynamicCache()
    for layer, length in enumerate((9, 5)):
        scratch.update(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
    with pytest.raises(ModelError, match=r"hold \[9, 5\] keys of this prompt"):
        fill_cache(plain("llava"), target, scratch, 0, True)
    assert target.get_seq_length() == 0


def test_image_and_video_with_features_for_later_layers() -> None:
    """Two kinds of features that later layers add together cannot be told apart in the graph yet."""
    inputs = prompt("qwen3_vl", Row(images=((2, 2),), video=(3, 2, 2)))
    with pytest.raises(UnsupportedCallError, match=r"image and video in one call.*give them in separate calls"):
        pruned("qwen3_vl")(**inputs)


def test_errors_have_one_base() -> None:
    for each in (ConfigError, HeadWeightsError, InputError, UnsupportedCallError, ModelError):
        assert issubclass(each, HawkError) and issubclass(each, (ValueError, TypeError))
