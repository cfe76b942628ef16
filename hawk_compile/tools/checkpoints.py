"""Checkpoint folders and their processors, read for the command line, and prompts made with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.exporting.quiet import quiet
from hawk_compile.files import shown
from hawk_compile.settings.checkpoint import kernel_of_hub
from hawk_compile.tools.absent import reason_of, remedy

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_for_tasks(folder: Path, dtype: str, device: str | None) -> tuple[Any, Any]:
    """Model and processor, as the command line names dtype and device.

    Raises:
        InputError: a folder that is no checkpoint, an unknown dtype or device.
        UnsupportedModelError: a checkpoint of another kind.
    """
    made, place = dtype_named(dtype), device_named(device)
    model, processor = read_checkpoint(folder, made)
    return model.to(place), processor


def dtype_named(name: str) -> torch.dtype:
    """Raises InputError for a name that is not in DTYPES."""
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def device_named(name: str | None) -> torch.device:
    """Raises InputError for a device that torch does not have here."""
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"device must be one that torch has here, such as cpu or cuda, got {name!r}: {reason}; give cpu, or "
            "install what it lacks"
        ) from None
    return device


def read_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    model = read_model(folder, dtype)
    return model, read_processor(folder)


def read_model(folder: Path, dtype: torch.dtype) -> Any:
    """A checkpoint's model in eval mode, without its processor."""
    if not (folder / "config.json").is_file():
        raise InputError(f"checkpoint must be a folder with a config.json, got {folder}: {remedy(folder)}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (attention := kernel_of_hub(config)) is not None:
            raise UnsupportedModelError(
                f"config.json of {folder} names the attention {shown(attention, 80)} of the Hub, which is code: take "
                "it out of there, or load the model in Python if you trust it"
            )
        return AutoModelForMultimodalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        ).eval()
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{folder} is no checkpoint of text and images or audio that can be pruned ({reason_of(error)}): "
            "give one that `hawk-compile inspect` knows"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be read as a checkpoint ({error}): give a folder that save_pretrained wrote, or download "
            "it again"
        ) from None


def read_processor(folder: Path) -> Any:
    try:
        with quiet():  # transformers warns of how classes of its own are written, of which a user can change nothing
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{folder} holds no processor that can be read ({reason_of(error)}): put the checkpoint's processor files "
            "there"
        ) from None
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            f"{folder} has no chat template, by which prompts are made here: put the checkpoint's chat_template.jinja "
            "there, or use hawk_compile.export and hawk_compile.load with inputs of your own"
        )
    return processor


def prompts(processor: Any, pictures: Sequence[list[Image.Image]], questions: Sequence[str]) -> dict[str, Any]:
    """The inputs of `generate` for questions about pictures, padded on the left, by the checkpoint's own chat template.

    Raises:
        InputError: the processor has no chat template.
    """
    texts = [rendered(processor, len(each), question) for each, question in zip(pictures, questions, strict=True)]
    given: dict[str, Any] = {"text": texts, "images": list(pictures) if any(pictures) else None, "return_tensors": "pt"}
    if begins(processor, texts[0]):  # the tokenizer would put a second one in front
        given["add_special_tokens"] = False
    if len(texts) > 1:
        given |= {"padding": True, "padding_side": "left"}
    return dict(processor(**given))


def prompt(processor: Any, pictures: list[Image.Image], question: str) -> dict[str, Any]:
    """`prompts` of one question."""
    return prompts(processor, [pictures], [question])


def fit(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the model's device, floats in its dtype."""
    placed = {name: value.to(model.device) for name, value in inputs.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in placed.items()}


def rendered(processor: Any, pictures: int, question: str) -> str:
    if getattr(processor, "chat_template", None) is None:
        raise InputError(
            f"processor {type(processor).__name__} has no chat template, by which prompts are made here: give one that "
            "has, or set processor.chat_template"
        )
    content: list[dict[str, str]] = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def begins(processor: Any, text: str) -> bool:
    """Whether a rendered prompt starts with the token that the tokenizer starts with."""
    token = getattr(processor.tokenizer, "bos_token", None)
    return isinstance(token, str) and text.startswith(token)
