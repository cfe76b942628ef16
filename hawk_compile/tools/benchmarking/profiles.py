"""The shapes of published models, as their config.json gives them, and of a small one for a CPU; without weights."""

from collections.abc import Callable
from typing import Any

from transformers import (
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from hawk_compile.errors import InputError

QWEN_IDS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
END_OF_TURN = 151645


def qwen2_text(**sizes: int) -> dict[str, Any]:
    return {"rms_norm_eps": 1e-6, "bos_token_id": 151643, "eos_token_id": END_OF_TURN, **sizes}


def mrope(*section: int, theta: float = 1e6, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **more}}


def qwen2_5_vl(text: dict[str, Any], *, tied: bool) -> PreTrainedConfig:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    text |= mrope(16, 24, 24)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **QWEN_IDS)


def qwen2_5_vl_3b() -> PreTrainedConfig:
    text = qwen2_text(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2,
    )  # fmt: skip
    return qwen2_5_vl(text, tied=True)


def qwen2_7b(vocabulary: int) -> dict[str, Any]:
    """The decoder that three of the models share."""
    return qwen2_text(
        vocab_size=vocabulary, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip


def qwen2_5_vl_7b() -> PreTrainedConfig:
    return qwen2_5_vl(qwen2_7b(152064), tied=False)


def qwen3_vl_4b() -> PreTrainedConfig:
    text = {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "eos_token_id": END_OF_TURN,
        **mrope(24, 20, 20, theta=5e6, mrope_interleaved=True),
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **QWEN_IDS)


def internvl3_8b() -> PreTrainedConfig:
    text = {"model_type": "qwen2", **qwen2_7b(151674)}
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "attention_bias": True, "image_size": [448, 448], "patch_size": [14, 14],
    }  # fmt: skip
    return InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=151667, image_seq_length=256, tie_word_embeddings=False
    )


def llava_onevision_7b() -> PreTrainedConfig:
    text = {"model_type": "qwen2", **qwen2_7b(152000)}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return LlavaOnevisionConfig(text_config=text, vision_config=vision)


def qwen2_5_vl_scaled(layers: int, width: int, vision_layers: int, vision_width: int) -> PreTrainedConfig:
    """Qwen2.5-VL with heads of 64, a KV head for four query heads, feed-forward layers four times as wide."""
    text = {
        "vocab_size": 1024, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256), "bos_token_id": 0,
        "eos_token_id": 4, **mrope(8, 12, 12),
    }  # fmt: skip
    vision = {
        "depth": vision_layers, "hidden_size": vision_width, "intermediate_size": 4 * vision_width,
        "num_heads": max(1, vision_width // 64), "out_hidden_size": width,
        "fullatt_block_indexes": [vision_layers - 1],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=1, vision_start_token_id=2, vision_end_token_id=3,
        video_token_id=5,
    )  # fmt: skip


def small() -> PreTrainedConfig:
    """For a CPU."""
    return qwen2_5_vl_scaled(layers=6, width=512, vision_layers=2, vision_width=256)


def light() -> PreTrainedConfig:
    """As small, with a lighter vision encoder: 0.27 of all FLOPs up to the first token at 1,024 visual tokens, where
    Qwen2.5-VL-7B's has 0.28 and small's 0.41."""
    return qwen2_5_vl_scaled(layers=6, width=512, vision_layers=2, vision_width=160)


def tiny() -> PreTrainedConfig:
    """To see that everything runs: too small for times that mean anything."""
    return qwen2_5_vl_scaled(layers=2, width=128, vision_layers=1, vision_width=32)


PROFILES: dict[str, Callable[[], PreTrainedConfig]] = {
    "small": small,
    "light": light,
    "tiny": tiny,
    "qwen2.5-vl-3b": qwen2_5_vl_3b,
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "qwen3-vl-4b": qwen3_vl_4b,
    "internvl3-8b": internvl3_8b,
    "llava-onevision-7b": llava_onevision_7b,
}


def profile(name: str) -> PreTrainedConfig:
    """The config of a profile.

    Raises:
        InputError: there is no profile of this name.
    """
    if name not in PROFILES:
        raise InputError(f"config must be one of {', '.join(PROFILES)}, got {name!r}; give a checkpoint by its folder")
    return PROFILES[name]()
