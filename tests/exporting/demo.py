"""The shipped model, and prompts for it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hawk_compile.tools.demo.scenes import Scene, make_scene

FOLDER = str(resources.files("hawk_compile.tools.demo").joinpath("model"))
SIZES = ((336, 336), (336, 364), (392, 336), (448, 336), (336, 420), (420, 392))


def fresh(**options: Any) -> Any:
    """One of one's own, in float32."""
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32, **options).eval()


@functools.cache
def model() -> Any:
    return fresh()


def cut(dtype: torch.dtype | str = "auto") -> Any:
    """The model with an encoder layer of each kind and one decoder layer."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True, dtype=dtype).eval()
    text, vision, visual = model.config.get_text_config(), model.config.vision_config, model.base_model.visual
    text.num_hidden_layers, text.layer_types = 1, text.layer_types[:1]
    vision.depth, vision.fullatt_block_indexes = 2, [1]
    del model.base_model.language_model.layers[1:], visual.blocks[0]
    visual.fullatt_block_indexes = [1]
    return model


def save_cut(folder: Path) -> None:
    """The checkpoint of `cut`, with all that lies beside the shipped one."""
    cut().save_pretrained(folder)
    processor().save_pretrained(folder)
    shutil.copy(Path(FOLDER) / "head_weights.json", folder)


@functools.cache
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER)


def batch(*rows: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """One prompt for each row of image sizes, padded on the left; each asks about its last picture."""
    images, texts = [], []
    for index, sizes in enumerate(rows):
        scenes = [make_scene("test", seed + 10 * index + each, size) for each, size in enumerate(sizes)]
        content = [*({"type": "image"} for _ in scenes), {"type": "text", "text": scenes[-1].questions[0].text}]
        turn = [{"role": "user", "content": content}]
        texts.append(processor().apply_chat_template(turn, add_generation_prompt=True))
        images.append([scene.pil() for scene in scenes])
    return dict(processor()(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))


def answer(model: Any, scene: Scene, question: str) -> str:
    """What a model says of a scene, 8 tokens at most."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor()(text=[text], images=[[scene.pil()]], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor().decode(ids, skip_special_tokens=True).strip()


def question(text: str = "How many digits?") -> dict[str, Any]:
    """A prompt without a picture."""
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor().apply_chat_template(turn, add_generation_prompt=True)
    return dict(processor()(text=[prompt], return_tensors="pt"))
