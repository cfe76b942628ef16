"""The same tiny model, asked about a video: a few frames in the place of each row's images.

Patches with a grid get another frame by rule; what else a model takes of a video its JSON tells, in `video_inputs`. The
model's encoder says how many tokens wait for it, and the plain model how they may stand in the prompt.
"""

import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.features import features_of
from hawk_compile.capture.modalities import encoder_of, placeholders_by_modality
from hawk_compile.tools.survey.outcome import Misdescribed, Unasked, Untried
from hawk_compile.tools.survey.tiny import Tiny, draw, plain, prompt

VIDEO = "pixel_values_videos"
GRID = "image_grid_thw"
"""[N, 3]: frames, height and width of images in patches, which lie one behind another."""
NAMES = {"pixel_values": VIDEO, GRID: "video_grid_thw", "image_merge_sizes": "video_merge_sizes"}
KINDS, OF_VIDEOS = "mm_token_type_ids", 2
"""The input that says of each token what it waits for, and what stands there for a video."""
FRAMES = 2


def video_of(tiny: Tiny, model: PreTrainedModel) -> Tiny:
    """The tiny model with a video in the place of the images of each row.

    Raises:
        Unasked: the model's forward takes no videos, takes frames for images, or fails on videos.
        Untried: nothing says what it takes of a video, or the plain model does not take that.
    """
    if any("video" in name for name in tiny.inputs):
        return tiny
    if VIDEO not in inspect.signature(model.forward).parameters:
        raise Unasked("the model's forward takes no videos, or takes frames for images")
    drawn = drawn_from(tiny.inputs)
    ids = drawn["input_ids"]
    per_token = {name: value for name, value in drawn.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    images = torch.isin(ids, torch.tensor(waiting(model, "image")))
    spans = {row.nonzero()[[0, -1], 0].diff().item() if row.any() else None for row in images}
    if None in spans or len(spans) > 1:
        raise Untried("its prompts hold images that take unequal room, or none: give each row as many tokens of images")
    video, count = encoded(tiny, model)
    count //= len(ids)
    troubles = []
    for number, marks, runs in itertools.product(waiting(model, "video", "image"), marks_of(model), (FRAMES, 1)):
        places, instead = laid_out(images, [number] * (count // runs), runs, marks)
        prompts = {name: as_video(name, value, places, instead, number) for name, value in per_token.items()}
        made = replace(tiny, inputs=prompts | video)
        try:
            plain(model, prompt(made, rows=1))
        except Misdescribed as error:
            troubles.append(f"{type(error.__cause__).__name__}: {error.__cause__}")
        else:
            return made
    if len(set(troubles)) == 1:
        raise Unasked(f"the model itself fails on a video, wherever it stands in the prompt ({troubles[0]})")
    raise Untried(
        "the plain model takes its video nowhere in the prompt: correct `video_inputs` in the JSON "
        f"({'; '.join(dict.fromkeys(troubles))})"
    )


def encoded(tiny: Tiny, model: PreTrainedModel) -> tuple[dict[str, Any], int]:
    """(inputs, tokens) of the videos of all rows: of a few frames, or of one where the model's encoder fails on more.

    Raises:
        Untried: nothing says what it takes of a video, or it does not take that.
    """
    trouble = "its videos are laid out otherwise than its images: describe one in `video_inputs` of the JSON"
    for frames in (FRAMES, 1):
        video = of_patches(tiny.inputs, frames) | tiny.video_inputs
        if VIDEO not in video:
            break
        try:
            return video, tokens_of(model, drawn_from(video))
        except Exception as error:
            trouble = (
                "its encoder takes no such video: describe one in `video_inputs` of the JSON "
                f"({type(error).__name__}: {error})"
            )
    raise Untried(trouble)


def waiting(model: PreTrainedModel, *modalities: str) -> list[int]:
    """The ids that wait for these modalities, in this order."""
    numbers = placeholders_by_modality(model, modalities).values()
    return list(dict.fromkeys(number for number in numbers if number is not None))


def marks_of(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """What may stand around a video: the ids that start and end one, where the config names them, or nothing."""
    start, end = (getattr(model.config, f"video_{side}_token_id", None) for side in ("start", "end"))
    return [()] if start is None or end is None else [(start, end), ()]


def drawn_from(inputs: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {name: draw(value, generator) for name, value in inputs.items()}


def of_patches(inputs: dict[str, Any], frames: int) -> dict[str, Any]:
    """Patches with a grid as those of so many frames for each image."""
    pixels, grid = inputs.get("pixel_values", {}), inputs.get(GRID, {})
    if "shape" not in pixels or "values" not in grid:
        return {}
    video = {NAMES[name]: dict(inputs[name]) for name in NAMES if name in inputs}
    count, *rest = pixels["shape"]
    video[VIDEO]["shape"] = [frames * count, *rest]
    video[NAMES[GRID]]["values"] = [[frames * t, h, w] for t, h, w in grid["values"]]
    return video


def tokens_of(model: PreTrainedModel, video: dict[str, Any]) -> int:
    """How many features the model's encoder makes of the videos of all rows."""
    encode = encoder_of(model, "video")
    assert encode is not None
    taken = inspect.signature(encode).parameters
    with torch.no_grad():
        output = encode(**{name: value for name, value in video.items() if name in taken}, return_dict=True)
    features = features_of(output)
    return sum(part.shape[:-1].numel() for part in ([features] if isinstance(features, Tensor) else features))


def laid_out(images: Tensor, run: list[int], runs: int, marks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(places [B, S'], ids [B, S']) of prompts with a video: where each token stands in the one with images, and the id
    that it has instead, or -1.

    Runs of the video stand where the first to the last token of images does. Between two runs stands what does around
    them: an image's end and start, or text.

    Args:
        images: [B, S] bool.
        run: the ids of a run.
        marks: the ids in front of all that and behind it, if any.
    """
    rows = []
    for row in images:
        first, last = row.nonzero()[[0, -1], 0].tolist()
        start, end = max(first - 1, 0), min(last + 2, len(row))
        before, after = ([(place, -1) for place in places] for places in (range(start, first), range(last + 1, end)))
        frames = (before + [(first, number) for number in run] + after) * runs
        rows.append([
            *((place, -1) for place in range(start)), *((start, mark) for mark in marks[:1]),
            *frames, *((end - 1, mark) for mark in marks[1:]), *((place, -1) for place in range(end, len(row))),
        ])  # fmt: skip
    places, ids = torch.tensor(rows).unbind(-1)
    return places, ids


def as_video(name: str, value: Tensor, places: Tensor, ids: Tensor, number: int) -> dict[str, Any]:
    """One input [B, S] of prompts with images, as of those with a video for which the id `number` waits; what else is
    given of its tokens is as of an image's first, or as of what stands around it."""
    there = value.gather(1, places)
    if name == "input_ids":
        there = torch.where(ids < 0, there, ids)
    if name == KINDS:
        there = there.masked_fill(ids == number, OF_VIDEOS)
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": there.tolist()}
