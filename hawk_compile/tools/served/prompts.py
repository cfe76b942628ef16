"""What the engine is asked: pictures and videos of noise, none of which comes twice, and questions of plain words."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedConfig

from hawk_compile.tools.benchmarking.images import FAMILIES, PATCHES, picture

WORDS = (
    "what", "which", "where", "how", "many", "is", "are", "the", "a", "of", "in", "on", "this", "picture", "colour",
    "shape", "red", "green", "blue", "left", "right", "above", "below", "next", "to", "small", "large", "round",
)  # fmt: skip

FRAMES_OF_STEP = 2
"""Frames that the models with patches read as one step of time."""


@dataclass(frozen=True)
class Turns:
    """A conversation about one picture or video, which stands in front of its first text.

    Attributes:
        data: 'image' or 'video' -> what vLLM takes under that name; a video with what is known of it beside it.
        texts: of user and assistant in turns, the user's first and last.
    """

    data: dict[str, Any]
    texts: tuple[str, ...]

    def asked(self, *texts: str) -> "Turns":
        """The same picture, and these texts."""
        return replace(self, texts=texts)

    def rendered(self, processor: Any) -> str:
        """By the checkpoint's chat template."""
        messages = []
        for number, text in enumerate(self.texts):
            media = [{"type": name} for name in self.data] if not number else []
            role = "assistant" if number % 2 else "user"
            messages.append({"role": role, "content": [*media, {"type": "text", "text": text}]})
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


class Maker:
    """Makes prompts for a checkpoint; the same in every run.

    Args:
        config: the checkpoint's.
        tokens: visual tokens of a picture or a video; of a model whose pictures are not made of patches, the nearest
            that is known, and of an unknown one whatever its processor makes of a square.
        words: of a question.
        seed: with another one, other pictures and questions.
    """

    def __init__(self, config: PreTrainedConfig, tokens: int, words: int, seed: int):
        self.random = random.Random(seed)
        self.noise = np.random.default_rng(seed)
        self.words = words
        self.size = pixels_of(config, tokens)
        self.video = video_of(config, tokens)

    def question(self) -> str:
        return " ".join(self.random.choices(WORDS, k=self.words))

    def image(self) -> Turns:
        values = self.noise.integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Turns({"image": Image.fromarray(values)}, (self.question(),))

    def film(self) -> Turns:
        """A video, all of whose frames are read."""
        frames, height, width = self.video
        values = self.noise.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        known = {
            "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip
        return Turns({"video": [(values, known)]}, (self.question(),))


def pixels_of(config: Any, tokens: int) -> tuple[int, int]:
    """(height, width) of a picture with so many visual tokens."""
    kind = FAMILIES.get(config.model_type)
    if kind == PATCHES:
        side = cell(config)
        height, width = picture(config, tokens).size
        return height * side, width * side
    if config.model_type == "internvl":
        side = config.vision_config.image_size[0]
        return side, side * max(1, picture(config, tokens).size[1] - 1)
    return picture(config, tokens).size if kind else (448, 448)


def video_of(config: Any, tokens: int) -> tuple[int, int, int]:
    """(frames, height, width) of a video with about so many visual tokens: as many steps of time as a frame is high and
    wide together, so that a step is a small part of it."""
    side = cell(config) if FAMILIES.get(config.model_type) == PATCHES else 28
    across = max(1, round(tokens ** (1 / 3) * 0.8))
    steps = max(1, math.ceil(tokens / across**2))
    return FRAMES_OF_STEP * steps, across * side, across * side


def cell(config: Any) -> int:
    """Pixels along a side of what becomes one visual token."""
    return config.vision_config.patch_size * config.vision_config.spatial_merge_size
