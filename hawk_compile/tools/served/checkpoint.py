"""A checkpoint with random weights that an engine loads as it is: the shapes of a profile, a tokenizer, a processor."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from hawk_compile.errors import InputError
from hawk_compile.tools.benchmarking.models import randomised
from hawk_compile.tools.benchmarking.profiles import profile
from hawk_compile.tools.served.prompts import WORDS

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_random(name: str, folder: Path, dtype: torch.dtype, most: int) -> Path:
    """Write a checkpoint of random weights.

    Args:
        name: of a profile.
        most: visual tokens of the largest picture or video that its processor leaves whole.

    Raises:
        InputError: no profile, or one of another family than Qwen2.5-VL, whose processor is not made here.
    """
    config = profile(name)
    if not isinstance(config, Qwen2_5_VLConfig):
        raise InputError(
            f"config {name!r} is a {config.model_type}, for which no processor is made here: take small, light, tiny "
            "or a qwen2.5-vl profile, or give a checkpoint by its folder"
        )
    torch.manual_seed(0)
    model = randomised(config, torch.device("cpu"), dtype, scoring_only=False)
    model.save_pretrained(folder)
    write_processor(config, folder, most)
    return folder


def write_processor(config: Any, folder: Path, most: int) -> None:
    """As files: transformers makes a video processor only where torchvision is, which the engine needs, not this."""
    tokenizer_for(config).save_pretrained(folder)
    vision = config.vision_config
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    shapes = {
        "patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }  # fmt: skip
    # Of a video, the bound is on all frames together.
    kinds = {"preprocessor_config": ("image_processor_type", "Qwen2VLImageProcessor", most * pixels),
             "video_preprocessor_config": ("video_processor_type", "Qwen2VLVideoProcessor",
                                           vision.temporal_patch_size * most * pixels)}  # fmt: skip
    for name, (key, kind, longest) in kinds.items():
        said = {
            key: kind, "processor_class": "Qwen2_5_VLProcessor",
            "size": {"shortest_edge": pixels, "longest_edge": longest}, **shapes,
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")


def tokenizer_for(config: Any) -> PreTrainedTokenizerFast:
    """One id for each word of the prompts that are made here, and the markers where a config has them."""
    text = config.get_text_config()
    markers = {
        "<|im_end|>": text.eos_token_id, "<|image_pad|>": config.image_token_id, "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id, "<|vision_end|>": config.vision_end_token_id,
    }  # fmt: skip
    free = (number for number in range(text.vocab_size) if number not in set(markers.values()))
    others = ("<|endoftext|>", "<|unk|>", "<|im_start|>", "user", "assistant", *WORDS)
    vocabulary = {**markers, **dict(zip(others, free, strict=False))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([*markers, "<|endoftext|>", "<|unk|>", "<|im_start|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<|unk|>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        padding_side="left", extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )  # fmt: skip
