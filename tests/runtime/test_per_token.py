"""Every argument that runs along the prompt reaches the model, cut to the tokens that are kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hawk_compile
from hawk_compile.errors import UnsupportedCallError
from tests import eager_reference as reference
from tests import zoo
from tests.runtime.models import ROUNDING, picture

IMAGE, END, EOS, VISUAL = 5, 4, 1, 32


def molmo2(seed: int = 0) -> PreTrainedModel:
    """A model whose visual tokens all attend to each other, both ways, by `mm_token_type_ids`."""
    kinds = pytest.importorskip("transformers.models.molmo2", reason="this transformers has no such model")
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = kinds.Molmo2Config(
        vision_config=small | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8},
        adapter_config=small | {"vision_feature_layer": [1], "num_key_value_heads": 4, "head_dim": 8,
                                "text_hidden_size": 32},
        text_config=small | {"head_dim": 8, "vocab_size": 99, "num_hidden_layers": 2, "qk_norm_type": "qwen3",
                             "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 0,
                             "eos_token_id": EOS, "pad_token_id": 2, "rope_scaling_layers": [0, 1]},
        image_start_token_id=3, image_end_token_id=END, image_patch_id=IMAGE,
    )  # fmt: skip
    model = kinds.Molmo2ForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that a mask that is wrong moves the logits
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    model.generation_config.eos_token_id = EOS
    return model


@cache
def plain() -> PreTrainedModel:
    return molmo2()


@cache
def prompt(rows: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 90, (rows, 7), generator=generator)
    ids = torch.cat([text[:, :2], torch.full((rows, VISUAL), IMAGE), torch.full((rows, 1), END), text[:, 2:]], 1)
    features = tuple(torch.randn(VISUAL, 32, generator=generator) for _ in range(rows))
    return {"input_ids": ids, "features": features, "mm_token_type_ids": (ids == IMAGE).long()}


def arguments(rows: int = 1) -> dict[str, Any]:
    given = dict(prompt(rows))
    encoded = BaseModelOutputWithPooling(pooler_output=given.pop("features"))
    return given | {"mm_encoder_outputs": {"image": encoded}}


def optimised(ratio: float) -> Any:
    return hawk_compile.optimize(molmo2(), ratio=ratio, backend="eager")


def test_the_mask_of_visual_tokens_moves_the_logits() -> None:
    given = arguments()
    both = plain()(**given).logits
    causal = plain()(**{**arguments(), "mm_token_type_ids": None}).logits
    assert (both - causal).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_ratio_0_is_the_plain_model(rows: int) -> None:
    assert optimised(0.0)(**arguments(rows)).logits.equal(plain()(**arguments(rows)).logits)


@torch.no_grad()
def test_pruned_equals_the_plain_model_on_what_is_kept() -> None:
    model = optimised(0.5)
    out = model(**arguments())
    keep = hawk_compile.report(out).keep_indices[0]
    assert len(keep) == arguments()["input_ids"].shape[1] - VISUAL // 2
    merged = reference.merged_inputs(plain(), arguments())["inputs_embeds"]
    cache = DynamicCache()
    expected = plain()(
        inputs_embeds=merged[:, keep], position_ids=keep[None], past_key_values=cache,
        mm_token_type_ids=prompt()["mm_token_type_ids"][:, keep],
    )  # fmt: skip
    torch.testing.assert_close(out.logits, expected.logits, **ROUNDING)
    length = prompt()["input_ids"].shape[1]
    for token in (20, 30, 40):  # and in steps behind it
        step = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[length]])}
        found = model(**step, past_key_values=out.past_key_values)
        torch.testing.assert_close(found.logits, plain()(**step, past_key_values=cache).logits, **ROUNDING)
        length += 1


@torch.no_grad()
def test_generate_and_a_second_turn() -> None:
    """generate hands the kinds of the whole conversation to a later turn's first step."""
    model, ids = optimised(0.5), prompt()["input_ids"]
    cache = DynamicCache()
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "past_key_values": cache}
    first = model.generate(**arguments(), max_new_tokens=3, **options)
    alone = model(**arguments())
    torch.testing.assert_close(first.logits[0], alone.logits[:, -1], **ROUNDING)
    longer = torch.cat([first.sequences, ids[:, -5:]], 1)
    kinds = torch.cat([prompt()["mm_token_type_ids"], torch.zeros(1, longer.shape[1] - ids.shape[1]).long()], 1)
    later = model.generate(input_ids=longer, mm_token_type_ids=kinds, max_new_tokens=1, **options)
    step = longer[:, ids.shape[1] :]
    places = torch.arange(ids.shape[1], longer.shape[1])[None]
    expected = model(input_ids=step, position_ids=places, past_key_values=alone.past_key_values)
    torch.testing.assert_close(later.logits[0], expected.logits[:, -1], **ROUNDING)


def test_a_new_image_on_a_cache_is_refused() -> None:
    model, cache = optimised(0.5), DynamicCache()
    model(**arguments(), past_key_values=cache)
    with pytest.raises(UnsupportedCallError, match=r"both ways \(mm_token_type_ids were given\)"):
        model(**arguments(), past_key_values=cache)


class WithSpeakers(LlavaForConditionalGeneration):
    """Its logits tell, of every position, the value that was given for it."""

    def forward(  # type: ignore[override]
        self, mm_encoder_outputs: Any = None, speakers: Tensor | None = None, **kwargs: Any
    ) -> Any:
        output = super().forward(mm_encoder_outputs=mm_encoder_outputs, **kwargs)
        if speakers is not None:
            output.logits = output.logits * 0 + speakers[..., None]
        return output


class WithTwoKinds(WithSpeakers):
    """The same of an argument [2, B, S] under **kwargs."""

    def forward(self, mm_encoder_outputs: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        kinds = kwargs.pop("kinds", None)
        speakers = None if kinds is None else kinds[1]
        return super().forward(mm_encoder_outputs=mm_encoder_outputs, speakers=speakers, **kwargs)


@pytest.mark.parametrize(("kind", "name"), [(WithSpeakers, "speakers"), (WithTwoKinds, "kinds")])
@torch.no_grad()
def test_an_argument_of_an_unknown_name_is_gathered(kind: type[Any], name: str) -> None:
    model = zoo.build("llava", layers=2)
    model.__class__ = kind
    hawk_compile.optimize(model, ratio=0.5, backend="eager")
    for which in (4, 2):  # another length: one graph
        inputs = picture("llava", which)
        length = inputs["input_ids"].shape[1]
        values = torch.arange(length)[None] * 1.0
        out = model(**inputs, **{name: values if name == "speakers" else torch.stack([-values, values])})
        report = hawk_compile.report(out)
        assert out.logits[0, :, 0].tolist() == report.keep_indices[0].tolist() and len(report.keep_indices[0]) < length
    assert model._hawk_runtime.compilations == 1


@torch.no_grad()
def test_what_only_positions_are_made_of_does_no_harm() -> None:
    """mRoPE models take mm_token_type_ids too: with and without them at hand, the same tokens and logits."""
    model = hawk_compile.optimize(zoo.build("qwen2_5_vl", layers=2), ratio=0.5, backend="eager")
    inputs = picture("qwen2_5_vl")
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    out = model(**inputs)
    assert out.logits.equal(model(**inputs, position_ids=positions).logits)
    without = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    assert out.logits.equal(model(**without, position_ids=positions).logits)
