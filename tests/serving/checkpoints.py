"""Tiny checkpoints with random weights that vLLM loads as it is: heads of 32, and a processor of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hawk_compile.tools.demo.run import MODEL

TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
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
                scale = 1.0 if "embed_tokens" in name else 1.6 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    if tower:
        file = folder / "model.safetensors"
        nested = {
            name.replace(tower, f"{tower}vision_model.", 1): value for name, value in load_file(file).items()
        }
        save_file(nested, file, metadata={"format": "pt"})
    return folder


def llava(folder: Path) -> Path:
    words = tokenizer("<image>", image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=112),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"height": 112, "width": 112}, crop_size={"height": 112, "width": 112}), words, patch_size=14,
        vision_feature_select_strategy="default", chat_template=words.chat_template, image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return save(hf.LlavaForConditionalGeneration(config), processor, folder, "vision_tower.")


KINDS: dict[str, Callable[[Path], Path]] = {"llava": llava}
