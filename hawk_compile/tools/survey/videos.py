"""The same tiny model, asked about a video: the patches of its images become those of frames."""

import inspect
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.tools.survey.outcome import Misdescribed, Unasked, Untried
from hawk_compile.tools.survey.tiny import Tiny, plain, prompt

NAMES = {
    "pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw", "image_merge_sizes": "video_merge_sizes",
}  # fmt: skip
OF_IMAGES, OF_VIDEOS = 1, 2
"""In `mm_token_type_ids`."""


def video_of(tiny: Tiny, model: PreTrainedModel) -> Tiny:
    """The tiny model with videos in the places of its images: of two frames (or pairs of them), half as high, where the
    plain model takes them so, else of one.

    Raises:
        Unasked: the model's forward takes no videos, or takes frames for images.
        Untried: it takes them otherwise than patches with a grid.
    """
    if any("video" in name for name in tiny.inputs):
        return tiny
    if "pixel_values_videos" not in inspect.signature(model.forward).parameters:
        raise Unasked("the model's forward takes no videos, or takes frames for images")
    image, video = (getattr(model.config, f"{name}_token_id", None) for name in ("image", "video"))
    if "image_grid_thw" in tiny.inputs and image is not None and video is not None:
        for frames in (2, 1):
            made = replace(tiny, inputs={NAMES.get(name, name): as_video(name, value, image, video, frames)
                                         for name, value in tiny.inputs.items()})  # fmt: skip
            try:
                plain(model, prompt(made, rows=1))
            except Misdescribed:
                continue
            return made
    raise Untried("its videos are laid out otherwise than its images, and no tiny model has one")


def as_video(name: str, value: Any, image: int, video: int, frames: int) -> Any:
    """One input of a prompt with images, as that of one with videos."""
    if name == "image_grid_thw":
        return {**value, "values": [[frames * t, h // frames, w] for t, h, w in value["values"]]}
    swaps = {"input_ids": (image, video), "mm_token_type_ids": (OF_IMAGES, OF_VIDEOS)}
    if name not in swaps:
        return value
    old, new = swaps[name]
    return {**value, "values": [[new if each == old else each for each in row] for row in value["values"]]}
