"""The shipped model, and prompts for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from hawk_compile.tools.demo.scenes import make_scene

FOLDER = str(resources.files("hawk_compile.tools.demo").joinpath("model"))
SIZES = ((336, 336), (336, 364), (392, 336), (448, 336), (336, 420), (420, 392))


@functools.cache
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="float32").eval()


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


def question(text: str = "How many digits?") -> dict[str, Any]:
    """A prompt without a picture."""
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    prompt = processor().apply_chat_template(turn, add_generation_prompt=True)
    return dict(processor()(text=[prompt], return_tensors="pt"))
