"""Models that encode and merge in the middle of their forward: what they merge by does not matter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hawk_compile import optimize, report, restore
from hawk_compile.capture.merging import encode_in_forward, in_front_of_layers, without_unawaited
from hawk_compile.capture.modalities import merges_itself
from hawk_compile.errors import ExportError, UnsupportedCallError, UnsupportedModelError
from hawk_compile.exporting.write import check_encoder
from hawk_compile.tools.survey.tiny import build, prompt, read
from tests.tiny import FOLDER

IMAGE = 3
IDS = torch.tensor([[7, 8, *[IMAGE] * 12, 9, 10, 11]])
MERGES = ("where", "index", "index_put")


class OwnConfig(PretrainedConfig):
    model_type = "merges_itself"

    def __init__(self, merge: str = "where", scale: float = 1.0, more: str = "", **kwargs: Any):
        self.merge, self.scale, self.more, self.image_token_id = merge, scale, more, IMAGE
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        return LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, attn_implementation="sdpa",
        )  # fmt: skip


class OwnBody(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.text = LlamaModel(config.get_text_config())
        self.tower = nn.Linear(5, 32)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text.embed_tokens

    def get_decoder(self) -> nn.Module:
        return self.text

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, image_sizes: Tensor | None = None, use_cache: bool | None = None,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.text.embed_tokens(input_ids)
            if pixel_values is not None and (input_ids == IMAGE).any():
                inputs_embeds = self.merged(inputs_embeds, input_ids == IMAGE, self.tower(pixel_values).flatten(0, 1))
        if input_ids is not None and self.config.more == "positions":
            position_ids = ((input_ids != IMAGE).cumsum(1) - 1).clamp(min=0)
        if input_ids is not None and self.config.more == "mask":
            image, length = input_ids == IMAGE, input_ids.shape[1]
            attention_mask = (torch.ones(length, length).tril().bool() | (image[:, :, None] & image[:, None]))[:, None]
        if self.config.more == "cache":
            past_key_values.get_seq_length()
        out = self.text(
            inputs_embeds=inputs_embeds * self.config.scale, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        if pixel_values is not None and self.config.more == "late":
            out.last_hidden_state = out.last_hidden_state + self.tower(pixel_values).mean((0, 1))
        return out

    def merged(self, embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        match self.config.merge:
            case "where":
                ranks = (mask.flatten().cumsum(0) - 1).clamp(min=0)
                return torch.where(mask[..., None], features[ranks].view_as(embeds), embeds)
            case "index":
                embeds = embeds.clone()
                embeds[mask] = features
                return embeds
            case "index_put":
                return embeds.index_put(torch.nonzero(mask, as_tuple=True), features)
        return embeds


class OwnModel(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.model = OwnBody(config)
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, image_sizes: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, pixel_values=pixel_values,
            image_sizes=image_sizes, use_cache=use_cache,
        )  # fmt: skip
        logits = self.lm_head(output.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def own(**settings: Any) -> OwnModel:
    torch.manual_seed(0)
    return OwnModel(OwnConfig(**settings)).eval()


def inputs() -> dict[str, Tensor]:
    pixels = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    return {"input_ids": IDS, "pixel_values": pixels, "image_sizes": torch.tensor([[2, 3], [2, 3]])}


@pytest.mark.parametrize("merge", MERGES)
def test_features_are_what_stands_in_front_of_the_layers(merge: str) -> None:
    model, given = own(merge=merge), inputs()
    with torch.no_grad():
        features = model.model.tower(given["pixel_values"]).flatten(0, 1)
        encoded = encode_in_forward(model, {**given, "use_cache": True})
    assert encoded.keys() == {"input_ids", "use_cache", "mm_encoder_outputs"}, "what only the merge reads is left out"
    assert torch.equal(encoded["mm_encoder_outputs"]["image"].pooler_output, features[None])
    assert all(not module._forward_pre_hooks for module in model.modules()), "others' calls run as before"


def test_it_equals_the_model_on_gathered_embeddings_and_a_step_behind_it() -> None:
    model, given = own(merge="index"), inputs()
    optimize(model, ratio=0.5, backend="eager", head_weights="uniform")
    with torch.no_grad():
        pruned = model(**given, use_cache=True)
        step = model(input_ids=IDS[:, :1], pixel_values=given["pixel_values"], past_key_values=pruned.past_key_values)
    keep = report(model).keep_indices[0]
    restore(model)
    with torch.no_grad():
        embeds, cache = in_front_of_layers(model, given)[:, keep], DynamicCache()
        expected = model(inputs_embeds=embeds, position_ids=keep[None], past_key_values=cache, use_cache=True)
        behind = model(input_ids=IDS[:, :1], position_ids=torch.tensor([[IDS.shape[1]]]), past_key_values=cache)
    assert len(keep) == IDS.shape[1] - 6
    assert torch.equal(pruned.logits, expected.logits) and torch.equal(step.logits, behind.logits)


def test_steps_of_generate_do_not_look_at_the_ids_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would wait for the device at every one; pixels are handed to all of them."""
    model, given, seen, looks = own(merge="index"), inputs(), [], []
    isin = torch.isin
    monkeypatch.setattr(torch, "isin", lambda *args, **kwargs: looks.append(args) or isin(*args, **kwargs))
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    prepare = model.prepare_inputs_for_generation
    handing_on = lambda *args, **kwargs: {**prepare(*args, **kwargs), "pixel_values": given["pixel_values"]}  # noqa: E731
    monkeypatch.setattr(model, "prepare_inputs_for_generation", handing_on)
    optimize(model, ratio=0.5, backend="eager", head_weights="uniform")
    counts = []
    for tokens in (2, 6):
        seen.clear(), looks.clear()
        model.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        assert len(seen) == tokens
        counts.append(len(looks))
    assert counts[0] == counts[1] > 0


def test_embeddings_that_change_behind_the_merge_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="changes all embeddings"), torch.no_grad():
        encode_in_forward(own(scale=2.0), inputs())


@pytest.mark.parametrize("more", ["positions", "mask", "late"])
def test_what_ids_and_pixels_do_beside_embeddings_is_refused_by_name(more: str) -> None:
    model = optimize(own(more=more), ratio=0.5, backend="eager", head_weights="uniform")
    with pytest.raises(UnsupportedModelError, match="makes more of ids and pixels than the emb"), torch.no_grad():
        model(**inputs())


def test_a_body_that_cannot_run_by_itself_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="without a cache, and raised AttributeError"), torch.no_grad():
        encode_in_forward(own(more="cache"), inputs())


def test_a_prompt_whose_pixels_nothing_waits_for_is_refused_by_name() -> None:
    """The model may put features in front of it."""
    model = optimize(own(), ratio=0.5, backend="eager", head_weights="uniform")
    with pytest.raises(UnsupportedCallError, match="pixel_values were given, and none of input_ids waits for them"):
        model(**{**inputs(), "input_ids": IDS[:, :2]})


def test_a_model_that_merges_nothing_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing of that stands in the places"), torch.no_grad():
        encode_in_forward(own(merge="none"), inputs())


def test_what_needs_an_encoder_apart_is_refused_by_name() -> None:
    model, given = own(), inputs()
    with pytest.raises(UnsupportedModelError, match="compile_vision: OwnModel encodes images in the middle"):
        optimize(model, ratio=0.5, compile_vision=True)
    with pytest.raises(UnsupportedModelError, match="image_cache: OwnModel encodes images in the middle"):
        optimize(model, ratio=0.5, image_cache="1MB")
    with pytest.raises(ExportError, match="writes the encoder as a component of its own"):
        check_encoder(model)
    optimize(model, ratio=0.5, head_weights="uniform")
    embeds = model.get_input_embeddings()(given.pop("input_ids"))
    with pytest.raises(UnsupportedCallError, match="give input_ids"):
        model(**given, inputs_embeds=embeds)


def test_pixels_that_nothing_waits_for_are_no_prompt() -> None:
    model, given = own(), inputs()
    assert merges_itself(model)
    assert without_unawaited(model, given) == given
    assert "pixel_values" not in without_unawaited(model, {**given, "input_ids": IDS[:, :2]})


def test_ids_of_the_encoders_own_configs_are_found() -> None:
    tiny = read(FOLDER / "phi4_multimodal.json")
    model, given = build(tiny), prompt(tiny, rows=1)
    with torch.no_grad():
        encoded = encode_in_forward(model, given)["mm_encoder_outputs"]
    assert {name: output.pooler_output.shape[1] for name, output in encoded.items()} == {"audio": 8, "image": 41}
