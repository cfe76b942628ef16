"""The demo model's architecture, vocabulary, chat template and processor, and how they are written as a checkpoint
folder."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hawk_compile.tools.demo.scenes import COLORS, DIGITS, SHAPES

SPECIAL = (
    "<|endoftext|>",
    "<|unk|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("system", "user", "assistant", "color", "digit", "shape", *COLORS, *DIGITS, *SHAPES)
VOCABULARY = {word: index for index, word in enumerate(SPECIAL + WORDS)}
ENDS: dict[str, Any] = {
    "bos_token_id": VOCABULARY["<|endoftext|>"],
    "eos_token_id": VOCABULARY["<|im_end|>"],
    "pad_token_id": VOCABULARY["<|endoftext|>"],
}
PLACES: dict[str, Any] = {
    "image_token_id": VOCABULARY["<|image_pad|>"],
    "video_token_id": VOCABULARY["<|video_pad|>"],
    "vision_start_token_id": VOCABULARY["<|vision_start|>"],
    "vision_end_token_id": VOCABULARY["<|vision_end|>"],
}

# Qwen2.5-VL's turns without its system prompt. The tokenizer drops the newlines: they have no token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_config(layers: int = 2) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with a small text model (`layers` layers, width 192) and a small vision tower (3 blocks, width
    128)."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.07,  # about 1 / sqrt(192): with 0.02, learning to look things up takes far longer
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
            **ENDS,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 192,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        **PLACES,
        tie_word_embeddings=True,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words stand apart by white space or punctuation, which has no token."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words joined by spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unk|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write the folder that AutoModelForImageTextToText, AutoProcessor and vLLM load: weights, each in the precision it
    has, tokenizer and processors."""
    model.generation_config.update(
        **ENDS,
        do_sample=False,
        max_new_tokens=4,
    )
    model.save_pretrained(folder)
    # The model is to be computed in the widest precision that its weights have; transformers writes that of the first.
    widest = reduce(torch.promote_types, (weight.dtype for weight in model.parameters()))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(widest).removeprefix("torch.")
    write_json(folder / "config.json", config)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 336 * 336, "longest_edge": 784 * 784},
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
    ).to_dict()
    image_processor["image_processor_type"] = "Qwen2VLImageProcessor"  # the auto class takes its PIL twin where it must
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    # Qwen2_5_VLProcessor holds a video processor, which transformers loads only where torchvision is installed. This
    # class of transformers does the same for images (one placeholder per merged patch, mm_token_type_ids) and has no
    # video part.
    processor = {"processor_class": "PaddleOCRVLProcessor", "image_processor": image_processor}
    write_json(folder / "processor_config.json", processor)
    # vLLM, which brings torchvision, takes Qwen2_5_VLProcessor whatever is named there, and asks for this file.
    shared = {name: value for name, value in image_processor.items() if name != "image_processor_type"}
    video_processor = {"video_processor_type": "Qwen2VLVideoProcessor", "min_frames": 4, "max_frames": 16, **shared}
    write_json(folder / "video_preprocessor_config.json", video_processor)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
