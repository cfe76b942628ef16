"""The reference implementation's kept positions, through the whole compiled path of a tiny Qwen2.5-VL."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hawk_compile
from tests.marks import slow

GOLDEN = Path(__file__).parent / "golden" / "layer0.safetensors"

with safe_open(GOLDEN, "pt") as file:
    SETTINGS = {name: json.loads(text) for name, text in file.metadata().items()}
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping

CASES = sorted(SETTINGS)


def model_of(case, settings, width, vocabulary):
    """A one-layer model whose first layer holds the golden weights and whose embeddings are given row by row."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": settings["heads"],
            "num_key_value_heads": settings["kv_heads"],
            "vocab_size": vocabulary,
            "rms_norm_eps": settings["rms_eps"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": width,
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(TENSORS[f"{case}.norm_weight"])
        for projection, letter in ((layer.self_attn.q_proj, "q"), (layer.self_attn.k_proj, "k")):
            projection.weight.copy_(TENSORS[f"{case}.w{letter}"])
            projection.bias.copy_(TENSORS[f"{case}.b{letter}"])
    return model


@pytest.mark.parametrize("case", [*CASES[:2], *slow(*CASES[2:])])
def test_kept_positions_equal_the_reference_implementation(case):
    """Every text position gets an id of its own, whose embedding is the golden hidden state there."""
    settings, hidden, ids = SETTINGS[case], TENSORS[f"{case}.hidden"][0], TENSORS[f"{case}.input_ids"][0]
    length, width = hidden.shape
    model = model_of(case, settings, width, length + 4)
    visual = ids == settings["image_token_id"]
    own = torch.where(visual, torch.tensor(length + 3), torch.arange(length))
    with torch.no_grad():
        model.get_input_embeddings().weight[:length] = hidden
    ends = (ids == settings["end_of_turn_token_id"]).nonzero().flatten().tolist()
    vision_end = int((ids == settings["vision_end_token_id"]).nonzero().max())
    hawk_compile.optimize(
        model,
        ratio=1 - settings["keep_ratio"],
        head_weights=TENSORS[f"{case}.head_weights"],
        backend="eager",
        vision_end_token_id=vision_end,
        end_of_turn_token_id=tuple(ends),
    )
    features = BaseModelOutputWithPooling(pooler_output=[hidden[visual]])
    positions = torch.arange(length).expand(4, 1, length)
    with torch.no_grad():
        model(input_ids=own[None], position_ids=positions, mm_encoder_outputs={"image": features})
    expected = TENSORS[f"{case}.keep_indices"]
    assert len(expected) < length
    assert hawk_compile.report(model).keep_indices[0].tolist() == expected.tolist()
