"""More of them: other kinds of the families that the engine is held to, and families that none of those is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf

from tests.serving.checkpoints import (
    TEXT,
    VISION,
    gemma3,
    llava,
    qwen,
    qwen_processor,
    qwen_sizes,
    qwen_words,
    rewrite,
    save,
    tokenizer,
    twin,
)

SIGLIP = {**VISION, "image_size": 112}


def pixtral(folder: Path) -> Path:
    """A tower that takes pictures of any size, under LLaVA; ends of lines between the visual tokens of one image."""
    words = tokenizer("[IMG]", image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**VISION, image_size=112, head_dim=32),
        text_config=hf.MistralConfig(**{**TEXT, "sliding_window": None}),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = hf.PixtralProcessor(pixels, words, patch_size=14, chat_template=words.chat_template)
    return save(hf.LlavaForConditionalGeneration(config), processor, folder)


def llava_onevision(folder: Path) -> Path:
    """Tiles whose rows end in an embedding of their own, and frames in the place of tiles."""
    words = tokenizer("<image>", image_token="<image>", video_token="<video>")
    grid = [[112, 112], [112, 224], [224, 112], [224, 224]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.Qwen2Config(**TEXT), image_grid_pinpoints=grid,
        image_token_index=words.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        video_token_index=words.convert_tokens_to_ids("<video>"), vision_feature_layer=-1,
    )  # fmt: skip
    size = {"height": 112, "width": 112}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), words,
        hf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=64, vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )  # fmt: skip
    return save(hf.LlavaOnevisionForConditionalGeneration(config), processor, folder, "vision_tower.")


def granite(folder: Path) -> Path:
    """A decoder that multiplies its embeddings and its residuals, with norms to which that matters."""
    multipliers = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 1.0,
                   "attention_multiplier": 0.1}  # fmt: skip
    return llava(folder, hf.GraniteConfig(**{**TEXT, "rms_norm_eps": 10.0}, **multipliers))


def cohere2_vision(folder: Path) -> Path:
    """Tiles with text between them, attention and MLP side by side, layers without rotary embeddings."""
    words = tokenizer("<|image|>", image_token="<|image|>", boi_token="<boi>", eoi_token="<eoi>",
                      img_line_break_token="<line>")  # fmt: skip
    text = {name: value for name, value in TEXT.items() if name != "rms_norm_eps"}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 1024, "logit_scale": 1.0}
    text["tie_word_embeddings"] = True
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.Cohere2Config(**text), downsample_factor=2,
        image_token_id=words.convert_tokens_to_ids("<|image|>"), alignment_intermediate_size=64,
    )  # fmt: skip
    pixels = hf.Cohere2VisionImageProcessor(
        size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=3, patch_size=4
    )
    processor = hf.Cohere2VisionProcessor(pixels, words, chat_template=words.chat_template)
    return save(hf.Cohere2VisionForConditionalGeneration(config), processor, folder, "vision_tower.")


def glm4v(folder: Path, experts: bool = False) -> Path:
    """Three axes of position, half of each head; channels rotated in pairs, but with experts."""
    names = {name: f"<|{name}|>" for name in ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video")}
    words = tokenizer("<|begin_of_image|><|image|><|end_of_image|>", image_token="<|image|>", video_token="<|video|>",
                      **names)  # fmt: skip
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image"), ("video", "video"), ("image_start", "begin_of_image"),
                            ("image_end", "end_of_image"), ("video_start", "begin_of_video"),
                            ("video_end", "end_of_video"))
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128,
              "image_size": 112, "patch_size": 14}  # fmt: skip
    text, family, whole = {**TEXT, "rope_parameters": rope}, "Glm4v", dict(ids)
    if experts:
        family, whole["tie_word_embeddings"] = "Glm4vMoe", False
        text |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": False}  # fmt: skip
    config = getattr(hf, f"{family}Config")(text_config=text, vision_config=vision, **whole)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 28 * 28 * 16, "longest_edge": 28 * 28 * 120}}
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**sizes), words, hf.Glm4vVideoProcessor(**sizes), chat_template=words.chat_template
    )
    return save(getattr(hf, f"{family}ForConditionalGeneration")(config), processor, folder)


def qwen3_5(folder: Path) -> Path:
    """Linear attention in front of softmax attention."""
    words, ids = qwen_words()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True,
            "partial_rotary_factor": 0.25}  # fmt: skip
    text = {
        **TEXT, "rope_parameters": rope, "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    }  # fmt: skip
    vision = {"hidden_size": 64, "depth": 2, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128,
              "patch_size": 14, "num_position_embeddings": 64}  # fmt: skip
    config = hf.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return save(hf.Qwen3_5ForConditionalGeneration(config), qwen_processor("3", words), folder)


def gemma4(folder: Path) -> Path:
    """Embeddings of each layer's own, by ids; norms of queries, keys and values."""
    names = {"image_token": "<|image|>", "boi_token": "<boi>", "eoi_token": "<eoi>", "audio_token": "<|audio|>",
             "boa_token": "<boa>", "eoa_token": "<eoa>", "video_token": "<|video|>"}  # fmt: skip
    words = tokenizer("<|image|>", **names)
    kinds = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token")
    ids = {f"{name}_id": words.convert_tokens_to_ids(names[name]) for name in kinds}
    text = {
        **TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512, "global_head_dim": 32,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0,
    }  # fmt: skip
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 32, "pooling_kernel_size": 2, "default_output_length": 70,
              "position_embedding_size": 256}  # fmt: skip
    config = hf.Gemma4Config(
        text_config=hf.Gemma4TextConfig(**text), vision_config=hf.Gemma4VisionConfig(**vision), audio_config=None,
        tie_word_embeddings=False, **ids,
    )  # fmt: skip
    sizes = {"patch_size": 14, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(), hf.Gemma4ImageProcessor(**sizes), words, hf.Gemma4VideoProcessor(**sizes),
        chat_template=words.chat_template, image_seq_length=70,
    )  # fmt: skip
    return save(hf.Gemma4ForConditionalGeneration(config), processor, folder)


def paligemma(folder: Path) -> Path:
    """Images in front of the prompt, where none of its ids stands for them."""
    words = tokenizer("<image>", image_token="<image>")
    words.add_tokens(["\n"])
    words.bos_token, words.add_bos_token = "<|im_start|>", True
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP, projection_dim=128),
        text_config=hf.GemmaConfig(**{**TEXT, "tie_word_embeddings": True}), projection_dim=128, hidden_size=128,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = hf.SiglipImageProcessor(size={"height": 112, "width": 112})
    pixels.image_seq_length = 64
    processor = hf.PaliGemmaProcessor(pixels, words, chat_template=words.chat_template)
    return save(hf.PaliGemmaForConditionalGeneration(config), processor, folder, "vision_tower.")


AUDIO = {"num_mel_bins": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "d_model": 64}


def qwen2_audio(folder: Path) -> Path:
    """Sounds alone."""
    words = tokenizer("<|AUDIO|>", audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>",
                      audio_eos_token="<|audio_eos|>")  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=AUDIO, text_config=hf.Qwen2Config(**TEXT).to_dict(),
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    processor = hf.Qwen2AudioProcessor(hf.WhisperFeatureExtractor(feature_size=128), words, audio_token="<|AUDIO|>")
    return save(hf.Qwen2AudioForConditionalGeneration(config), processor, folder)


def omni(folder: Path, version: str) -> Path:
    """A model that talks, of which vLLM serves the part that reads: that one by itself stands beside it."""
    names = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
        "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
    }  # fmt: skip
    words = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", **names)
    number = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    ids = {
        "vision_start_token_id": number["vision_bos_token"], "vision_end_token_id": number["vision_eos_token"],
        "audio_start_token_id": number["audio_bos_token"], "audio_end_token_id": number["audio_eos_token"],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    vision = {"hidden_size": 64, "embed_dim": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128,
              "patch_size": 14}  # fmt: skip
    if version == "2_5":
        family, named = "Qwen2_5Omni", "token_index"
        vision |= {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        family, named = "Qwen3OmniMoe", "token_id"
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
        text["rope_parameters"] = {**rope, "mrope_interleaved": True}
        vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "image_size": 112,
                   "apply_vit_abs_pos_embed": True}  # fmt: skip
    reads = getattr(hf, f"{family}ThinkerConfig")(
        text_config=text, vision_config=vision, audio_config={**AUDIO, "output_dim": 128, "downsample_hidden_size": 32},
        **ids, **{f"{kind}_{named}": number[f"{kind}_token"] for kind in ("image", "video", "audio")},
    )  # fmt: skip
    sizes = qwen_sizes(version)
    processor = getattr(hf, f"{family}Processor")(
        hf.Qwen2VLImageProcessor(**sizes), hf.Qwen2VLVideoProcessor(**sizes),
        hf.WhisperFeatureExtractor(feature_size=128), words, chat_template=words.chat_template,
    )  # fmt: skip
    alone = save(getattr(hf, f"{family}ThinkerForConditionalGeneration")(reads), processor, twin(folder))
    shutil.copytree(alone, folder, dirs_exist_ok=True)
    rewrite(folder, lambda name, value: (f"thinker.{name}", value))
    config = {
        "model_type": "qwen2_5_omni" if version == "2_5" else "qwen3_omni_moe",
        "architectures": [f"{family}ForConditionalGeneration"], "enable_audio_output": False,
        "thinker_config": json.loads((alone / "config.json").read_text()),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen3_vl_moe(folder: Path) -> Path:
    """Experts, whose weights published checkpoints have the other way round than transformers writes them."""
    words, ids = qwen_words()
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0, "mrope_interleaved": True}
    text = {**TEXT, "rope_parameters": rope, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "norm_topk_prob": True}  # fmt: skip
    vision = {"hidden_size": 64, "depth": 3, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128,
              "patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}  # fmt: skip
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    alone = save(hf.Qwen3VLMoeForConditionalGeneration(config), qwen_processor("3", words), twin(folder))
    shutil.copytree(alone, folder, dirs_exist_ok=True)
    rewrite(folder, lambda name, value: (name, value.transpose(1, 2).contiguous() if ".experts." in name else value))
    return folder


OTHER_KINDS: dict[str, Callable[[Path], Path]] = {
    # First: a process that began without experts has no group of ranks for any.
    "qwen3_omni_moe": lambda folder: omni(folder, "3"),
    "qwen3_vl_moe": qwen3_vl_moe,
    "glm4v_moe": lambda folder: glm4v(folder, experts=True),
    "qwen2_5_vl": lambda folder: qwen("2_5", folder),
    "gemma3.window": lambda folder: gemma3(folder, window=12),
    "pixtral": pixtral,
    "llava_onevision": llava_onevision,
    "cohere2_vision": cohere2_vision,
    "glm4v": glm4v,
    "gemma4": gemma4,
    "granite": granite,
    "qwen2_5_omni": lambda folder: omni(folder, "2_5"),
}
