"""Tiny checkpoints with random weights that vLLM loads as it is: heads of 32, and a processor of their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawk_compile.tools.demo.run import MODEL

TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip
CHAT = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def tokenizer(image: str, **named: str) -> Any:
    """The demo's forty words and markers, and those of a family, which its processor reads by name."""
    made = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(MODEL / "tokenizer.json"), unk_token="<|unk|>", pad_token="<|endoftext|>",
        eos_token="<|im_end|>", extra_special_tokens=named, padding_side="left",
    )  # fmt: skip
    made.chat_template = CHAT.format(image=image)
    return made


def save(model: Any, processor: Any, folder: Path, tower: str = "") -> Path:
    """With weights large enough for attention that is not flat, under the names that published checkpoints have.

    Args:
        tower: what stands in front of the names of a vision tower that published checkpoints nest once more.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan_in = weight.shape[1] if weight.ndim == 3 else weight[0].numel()  # 3: experts
                scale = 1.0 if "embed_tokens" in name else 1.6 / fan_in**0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif len(weight.unique()) > 1:  # drawn anew in every process, as the end of a line of LLaVA-NeXT's tiles
                weight.copy_(torch.randn(weight.shape, generator=generator) / len(weight) ** 0.5)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    if tower:
        rewrite(folder, lambda name, value: (name.replace(tower, f"{tower}vision_model.", 1), value))
    return folder


def rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    """Give the weights of a checkpoint the names and shapes that published ones have."""
    file = folder / "model.safetensors"
    save_file(dict(change(*each) for each in load_file(file).items()), file, metadata={"format": "pt"})


def llava(folder: Path, text: Any = None) -> Path:
    """Over the decoder of a configuration; None: Llama's."""
    words = tokenizer("<image>", image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=112),
        text_config=text or hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"height": 112, "width": 112}, crop_size={"height": 112, "width": 112}),
        words, patch_size=14, vision_feature_select_strategy="default", chat_template=words.chat_template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return save(hf.LlavaForConditionalGeneration(config), processor, folder, "vision_tower.")


def llava_next(folder: Path) -> Path:
    """Tiles, whose rows end in an embedding of their own."""
    words = tokenizer("<image>", image_token="<image>")
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=84), text_config=hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
        image_grid_pinpoints=[[84, 168], [168, 84], [168, 168]],
    )  # fmt: skip
    pixels = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 84},
        crop_size={"height": 84, "width": 84},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = hf.LlavaNextProcessor(
        pixels, words, patch_size=14, vision_feature_select_strategy="default", chat_template=words.chat_template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return save(hf.LlavaNextForConditionalGeneration(config), processor, folder, "vision_tower.")


def qwen_words() -> tuple[Any, dict[str, int]]:
    """(the tokenizer of Qwen's checkpoints, the ids that their configurations name)."""
    words = tokenizer(
        "<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                            ("vision_end", "vision_end"))
    }  # fmt: skip
    return words, ids


QWEN = {"2": "Qwen2VL", "2_5": "Qwen2_5_VL", "3": "Qwen3VL"}


def qwen_sizes(version: str) -> dict[str, Any]:
    """Of the patches of pictures and frames."""
    sizes = {
        "size": {"shortest_edge": 28 * 28 * 16, "longest_edge": 28 * 28 * 60}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    # vLLM normalises frames by the numbers for pictures
    return {**sizes, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} if version == "3" else sizes


def qwen_processor(version: str, words: Any) -> Any:
    sizes = qwen_sizes(version)
    video = (hf.Qwen3VLVideoProcessor if version == "3" else hf.Qwen2VLVideoProcessor)(**sizes)
    kind = getattr(hf, f"{QWEN[version]}Processor")
    return kind(hf.Qwen2VLImageProcessor(**sizes), words, video, chat_template=words.chat_template)


def qwen(version: str, folder: Path) -> Path:
    """Three axes of position."""
    words, ids = qwen_words()
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    vision = {"hidden_size": 64, "depth": 2, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128,
              "patch_size": 14}  # fmt: skip
    if version == "2":
        vision = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128, "patch_size": 14}
    elif version == "2_5":  # windows of 4 x 4 patches in the first layer
        vision |= {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    else:
        vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        text["rope_parameters"] = {**rope, "mrope_interleaved": True}
    config = getattr(hf, f"{QWEN[version]}Config")(text_config=text, vision_config=vision, **ids)
    model = getattr(hf, f"{QWEN[version]}ForConditionalGeneration")(config)
    return save(model, qwen_processor(version, words), folder)


def internvl(folder: Path) -> Path:
    words = tokenizer(
        "<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**{**VISION, "patch_size": [14, 14]}, image_size=[112, 112]),
        text_config=hf.Qwen2Config(**TEXT), image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    pixels = hf.GotOcr2ImageProcessor(size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=4)
    processor = hf.InternVLProcessor(
        pixels, words, hf.InternVLVideoProcessor(size={"height": 112, "width": 112}), image_seq_length=16,
        chat_template=words.chat_template,
    )  # fmt: skip
    return save(hf.InternVLForConditionalGeneration(config), processor, folder)


def gemma3(folder: Path, window: int = 512) -> Path:
    """Visual tokens that see each other both ways, norms of queries and keys, scaled embeddings."""
    words = tokenizer(
        "<start_of_image>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    words.add_tokens(["\n" * count for count in range(1, 5)])
    text = {**TEXT, "sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=112), text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=16, boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = hf.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    processor = hf.Gemma3Processor(pixels, words, chat_template=words.chat_template, image_seq_length=16)
    return save(hf.Gemma3ForConditionalGeneration(config), processor, folder, "vision_tower.")


def idefics3(folder: Path, family: str = "Idefics3") -> Path:
    """Tags of tiles between the visual tokens of one image."""
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = tokenizer("<image>", image_token="<image>", fake_image_token="<fake_token_around_image>",
                      global_image_token="<global-img>", end_of_utterance="<end_of_utterance>",
                      **{f"tag_{number}": tag for number, tag in enumerate(tags)})  # fmt: skip
    text = hf.LlamaConfig(**{**TEXT, "vocab_size": 128})
    config = getattr(hf, f"{family}Config")(
        vision_config={**VISION, "image_size": 112}, text_config=text, scale_factor=2, pad_token_id=0,
        image_token_id=words.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    pixels = getattr(hf, f"{family}ImageProcessor")(size={"longest_edge": 224}, max_image_size={"longest_edge": 112})
    options: dict[str, Any] = {"image_seq_len": 16, "chat_template": words.chat_template}
    if family == "SmolVLM":
        options["video_processor"] = hf.SmolVLMVideoProcessor(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 112}, video_sampling={"max_frames": 4, "fps": 1}
        )
    processor = getattr(hf, f"{family}Processor")(pixels, words, **options)
    return save(getattr(hf, f"{family}ForConditionalGeneration")(config), processor, folder)


def twin(folder: Path) -> Path:
    """The folder beside a checkpoint's in which the same weights stand for transformers, where it needs another one."""
    return Path(f"{folder}-for-transformers")


def smolvlm(folder: Path) -> Path:
    """Its twin has the class that its own was made from, the same function: `optimize` needs transformers 5.21 for
    SmolVLM's own class, and vLLM 0.32 comes with an older one."""
    idefics3(folder, "SmolVLM")
    shutil.copytree(folder, twin(folder), dirs_exist_ok=True)
    file = twin(folder) / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "idefics3", "architectures": ["Idefics3ForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "idefics3_vision"
    file.write_text(json.dumps(config))
    return folder


def mistral3(folder: Path) -> Path:
    """Ends of lines between the visual tokens of one image."""
    words = tokenizer("[IMG]", image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**VISION, image_size=224, head_dim=32),
        text_config=hf.MistralConfig(**{**TEXT, "sliding_window": None}), spatial_merge_size=2,
        image_token_index=words.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 224}, patch_size={"height": 28, "width": 28})
    processor = hf.PixtralProcessor(
        pixels, words, patch_size=14, spatial_merge_size=2, chat_template=words.chat_template
    )
    return save(hf.Mistral3ForConditionalGeneration(config), processor, folder)


KINDS: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": lambda folder: qwen("2", folder),
    "qwen3_vl": lambda folder: qwen("3", folder),
    "internvl": internvl,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "mistral3": mistral3,
}
