"""Conversations that a server gets: several pictures, several turns, pictures of different sizes, no text at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from hawk_compile.tools.demo.scenes import pick_questions

Part = Image.Image | str

SIZES = ((336, 448), (70, 300), (300, 70), (100, 100), (224, 224))
"""(width, height) in pixels."""


class Asked:
    """What a prompt is made of: pictures, unless a subclass has something else."""

    images: list[Image.Image]

    def rendered(self, processor: Any) -> str:
        raise NotImplementedError

    def inputs(self, processor: Any) -> Any:
        """For Hugging Face's model."""
        return processor(images=self.images or None, text=self.rendered(processor), return_tensors="pt")

    @property
    def data(self) -> dict[str, Any]:
        """For vLLM."""
        return {"image": self.images}


@dataclass(frozen=True)
class Film(Asked):
    """One turn with a video, at two frames in a second.

    Attributes:
        frames: [T, height, width, 3] uint8.
    """

    frames: np.ndarray
    text: str

    def rendered(self, processor: Any) -> str:
        """With the placeholder of a video where the template, which knows pictures alone, has that of a picture."""
        parts = [{"type": "image"}, {"type": "text", "text": self.text}]
        turn = [{"role": "user", "content": parts}]
        text: str = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return text.replace(processor.image_token, processor.video_token)

    @property
    def facts(self) -> dict[str, Any]:
        count = len(self.frames)
        return {"fps": 2.0, "duration": count / 2, "total_num_frames": count, "frames_indices": list(range(count))}

    def inputs(self, processor: Any) -> Any:
        made = processor(
            text=self.rendered(processor), videos=[self.frames], video_metadata=[VideoMetadata(**self.facts)],
            do_sample_frames=False, return_tensors="pt",
        )  # fmt: skip
        for name in [name for name, value in made.items() if value is None]:
            del made[name]
        return made

    @property
    def data(self) -> dict[str, Any]:
        return {"video": [(self.frames, {**self.facts, "video_backend": "opencv", "do_sample_frames": False})]}


@dataclass(frozen=True)
class Conversation(Asked):
    """Turns of a user, each with its pictures and texts in order; between them, answers of one word."""

    turns: Sequence[Sequence[Part]]

    @property
    def images(self) -> list[Image.Image]:  # type: ignore[override]
        return [part for turn in self.turns for part in turn if not isinstance(part, str)]

    def rendered(self, processor: Any) -> str:
        """By the chat template; of a checkpoint without one, pictures' placeholders and texts one after the other."""
        if not processor.chat_template:
            parts = [part for turn in self.turns for part in turn]
            return "".join(part if isinstance(part, str) else processor.image_token for part in parts)
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            if messages:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
            parts = [{"type": "text", "text": each} if isinstance(each, str) else {"type": "image"} for each in turn]
            messages.append({"role": "user", "content": parts})
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def conversations() -> dict[str, list[Conversation]]:
    """By what is special of them, over scenes of the demo."""
    pairs = pick_questions("test", 24)
    texts = [question.text for _, question in pairs]

    def picture(number: int, size: tuple[int, int] | None = None) -> Image.Image:
        scene = pairs[number][0].pil()
        return scene.resize(size) if size else scene

    def talk(at: int) -> Conversation:
        return Conversation([
            [picture(2 * at), texts[at]], [picture(2 * at + 1, SIZES[at]), texts[at + 5]], [texts[at + 9]],
        ])  # fmt: skip

    return {
        "one": [Conversation([[picture(at), texts[at]]]) for at in range(4)],
        "sizes": [Conversation([[picture(at, size), texts[at]]]) for at, size in enumerate(SIZES)],
        "several": [
            Conversation([[picture(2 * at), picture(2 * at + 1, SIZES[at]), texts[at]]]) for at in range(3)
        ],
        "text between": [
            Conversation([[picture(2 * at), texts[at], picture(2 * at + 1), texts[at + 1]]]) for at in range(2)
        ],
        "turns": [talk(at) for at in range(3)],
        "no text": [Conversation([[picture(at)]]) for at in range(2)],
    }  # fmt: skip


def films() -> list[Film]:
    """Pictures that move."""
    pairs = pick_questions("test", 3)
    made = []
    for (scene, question), count in zip(pairs, (4, 4, 6), strict=True):
        picture = np.asarray(scene.pil().resize((140, 112)))
        made.append(Film(np.stack([np.roll(picture, 17 * at, 1) for at in range(count)]), question.text))
    return made
