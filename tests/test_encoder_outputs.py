"""What encoders give, in every form, and the names under which they take it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

import hawk_compile
from hawk_compile.capture.encode import refuse_more_than_features
from hawk_compile.capture.features import EXTRA_ROWS, count_in, cut_extra_rows, features_of, join_features
from hawk_compile.capture.modalities import raw_inputs_of, required_by
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.tools.survey.checks import prefill
from hawk_compile.tools.survey.tiny import build, prompt
from tests.tiny import tiny

WIDTH = 4


@dataclasses.dataclass
class Required(ModelOutput):
    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


@dataclasses.dataclass
class Layered(BaseModelOutputWithPooling):
    deepstack_features: list[Any] | None = None


def rows(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def flat(features: Any) -> Tensor:
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.reshape(-1, WIDTH) for part in parts])


@pytest.mark.parametrize(("output", "dims"), [
    (BaseModelOutputWithPooling(pooler_output=rows(6, WIDTH)), 2),
    (BaseModelOutputWithPooling(pooler_output=rows(2, 3, WIDTH)), 3),
    (BaseModelOutputWithPooling(pooler_output=rows(2, 3, 5, WIDTH)), 4),
    (BaseModelOutputWithPooling(pooler_output=[rows(2, WIDTH), rows(3, WIDTH)]), 2),
    (BaseModelOutputWithPooling(pooler_output=(rows(1, 2, WIDTH), rows(1, 3, WIDTH))), 3),
    (BaseModelOutputWithPooling(last_hidden_state=rows(2, 3, WIDTH)), 3),
    (Required(last_hidden_state=rows(2, WIDTH, 3), pooler_output=rows(2, 3, WIDTH)), 3),
    (Layered(deepstack_features=[(7, [rows(2, WIDTH), rows(3, WIDTH)]), (0, [rows(2, WIDTH), rows(3, WIDTH)])]), 2),
])  # fmt: skip
def test_features_of_every_form_are_joined_over_images_and_cut_again(output, dims):
    """What the graph is given has rows more and as many dimensions; behind the cut it holds the same rows in order."""
    joined = join_features({"image": output})
    features, expected = features_of(joined["image"]), features_of(output)
    assert isinstance(features, Tensor) == isinstance(expected, Tensor)
    assert count_in(features) == len(flat(expected)) + EXTRA_ROWS
    cut = features_of(cut_extra_rows(joined)["image"])
    assert (cut if isinstance(cut, Tensor) else cut[0]).ndim == dims
    assert torch.equal(flat(cut), flat(expected))


def test_features_for_later_layers_keep_their_layers_numbers():
    output = Layered(deepstack_features=[(7, [rows(2, WIDTH)]), (0, [-rows(2, WIDTH)])])
    cut = cut_extra_rows(join_features({"image": output}))["image"].deepstack_features
    assert [number for number, _ in cut] == [7, 0]
    assert torch.equal(cut[1][1][0], -rows(2, WIDTH))


@pytest.mark.parametrize(("kind", "body", "expected"), [
    ("FuyuForCausalLM", "FuyuModel", {"image": ("pixel_values", "pixel_values_images", "image_patches")}),
    ("VibeVoiceAsrForConditionalGeneration", "VibeVoiceAsrModel", {"audio": ("input_values", "input_features")}),
    ("InstructBlipVideoForConditionalGeneration", "InstructBlipVideoForConditionalGeneration",
     {"video": ("pixel_values", "pixel_values_videos"), "image": ("pixel_values_images", "image_patches")}),
])  # fmt: skip
def test_what_an_encoder_takes_first_is_its_modality(kind, body, expected):
    names = raw_inputs_of(getattr(transformers, kind), getattr(transformers, body))
    assert {modality: names[modality] for modality in expected} == expected


def test_a_forward_says_what_it_cannot_be_called_without():
    assert required_by(transformers.Blip2ForConditionalGeneration) == {"pixel_values", "input_ids"}
    assert required_by(transformers.LlavaForConditionalGeneration) == set()


def check(name: str, run: Any) -> None:
    run(tiny(name), build(tiny(name)))


@pytest.mark.parametrize("name", ["fuyu", "vibevoice_asr"])
def test_features_are_merged_whatever_their_name_and_that_of_what_is_encoded(name):
    """Last hidden states where nothing is pooled; raw audio. tests/tools/survey/test_types.py has every form."""
    prefill(tiny(name), build(tiny(name)))


def test_audio_features_that_a_mask_leaves_out_are_not_merged():
    """Where the merge applies it, not the encoder: it is applied in front of the graph."""
    row = prompt(tiny("granite_speech"), rows=1)
    model = build(tiny("granite_speech"))
    with torch.no_grad():
        count = model.model.get_audio_features(row["input_features"]).pooler_output.shape[1]
    placeholders = (row["input_ids"][0] == model.config.audio_token_id).nonzero().flatten()
    ids, last = row["input_ids"], int(placeholders[-1])
    row["input_ids"] = torch.cat([ids[:, :last], ids[:, last + 1 :]], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    row["input_features_mask"] = torch.arange(count)[None] != 1
    with torch.no_grad():
        plain = model(**row).logits
        hawk_compile.optimize(model, ratio=0.0, modalities=("audio",), backend="eager", head_weights="uniform")
        assert torch.equal(model(**row).logits, plain)
    assert hawk_compile.report(model).visual_tokens.tolist() == [count - 1]


def test_audio_that_is_merged_by_more_than_its_features_is_refused():
    """Gemma 3n pads what its encoder masks out."""
    kind = transformers.models.gemma3n.modeling_gemma3n.Gemma3nAudioEncoderModelOutput
    given = kind(pooler_output=rows(1, 2, WIDTH), audio_mel_mask=torch.ones(1, 2).bool())
    with pytest.raises(UnsupportedCallError, match="merges audio by audio_mel_mask of its encoder too"):
        refuse_more_than_features(build(tiny("fuyu")), given)
