"""Rows of a drawn prompt: their ids, what votes in them, and the batch that a processor would make of them.

A row is JSON:

    {"turns": [{"before": 2, "images": [[2, 3]], "between": 1, "after": 4, "answer": 2}, ...], "tail": 2, "seed": 7}

with "video": [frames, height, width] or "audio": [length, ...] in place of images, in the architecture's own units. One
turn is laid out as in `tests.zoo`; several stand in a chat whose headers differ in the role.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import zoo
from tests.zoo import Row
from tests.zoo import common as c

USER, ANSWER = [20, 21, 22], [20, 23, 22]
PLACEHOLDERS = {"image": c.IMAGE, "video": c.VIDEO, "audio": c.AUDIO}
VISUAL = tuple(PLACEHOLDERS.values())
SURE = 3
"""Text tokens behind a turn's last image, or of a turn without any, from which on they are surely its question: fewer
may be taken for what closes an image."""


@dataclass(frozen=True)
class Group:
    """Visual tokens that one question scores, both as positions in their row."""

    visual: list[int]
    question: list[int]


@dataclass(frozen=True)
class Line:
    """One row of a prompt without padding.

    Attributes:
        ids: [S].
        visual: the positions of visual tokens.
        units: tokens of each image, tile or frame.
        turns: of each user's turn the visual tokens and the text behind the last of them.
        sure: whether who votes is said by the layout, not by the rules for what little text there is.
    """

    ids: list[int]
    visual: list[int]
    units: list[int]
    turns: list[Group]
    sure: bool


def of_turn(turn: dict[str, Any], tail: int | None) -> Row:
    return Row(
        images=tuple(tuple(size) for size in turn.get("images", ())),
        video=tuple(turn["video"]) if turn.get("video") else None,
        audio=tuple(turn.get("audio", ())),
        before=turn.get("before", 0), between=turn.get("between", 0), after=turn.get("after", 0), tail=tail,
    )  # fmt: skip


def line_of(
    name: str, row: dict[str, Any], ends: tuple[int, ...] = (), modalities: tuple[str, ...] = tuple(PLACEHOLDERS)
) -> Line:
    """
    Args:
        ends: ids that close an image, as the model's config names them.
        modalities: whose tokens may be removed.
    """
    wanted = {PLACEHOLDERS[modality] for modality in modalities}
    architecture, generator = zoo.ARCHITECTURES[name], torch.Generator().manual_seed(row["seed"])
    turns, tail = row["turns"], row.get("tail", 2)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, turn in enumerate(turns):
        alone = len(turns) == 1
        made = architecture.row_ids(of_turn(turn, tail if alone else None), generator)
        made = made if alone else [*USER, *(each for each in made if each != c.START)]
        begin = len(ids) if alone else len(ids) + len(USER)
        closed = len(architecture.close(tail)) if alone and name != "paligemma" else 0
        ids += made
        spans.append((begin, len(ids) - closed))
        if not alone:
            last = number == len(turns) - 1
            ids += [c.END_OF_TURN, *ANSWER]
            ids += [] if last else [*c.text(turn.get("answer", 2), generator), c.END_OF_TURN]
    visual = [place for place, number in enumerate(ids) if number in wanted]
    groups = [group(ids, span, ends, wanted) for span in spans]
    few = [turn.get("after", 0) < SURE for turn in turns]
    return Line(ids, visual, [size for turn in turns for size in units(name, turn)], groups, not any(few))


def group(ids: list[int], span: tuple[int, int], ends: tuple[int, ...], wanted: set[int]) -> Group:
    visual = [place for place in range(*span) if ids[place] in wanted]
    shown = [place for place in range(*span) if ids[place] in (*VISUAL, *ends)]
    start = shown[-1] + 1 if shown else span[0]
    return Group(visual, [place for place in range(start, span[1]) if ids[place] != c.START])


def units(name: str, turn: dict[str, Any]) -> list[int]:
    """Tokens of each image, tile or frame of a turn."""
    architecture, count = zoo.ARCHITECTURES[name], len(turn.get("images", ()))
    sizes = []
    for size in turn.get("images", ()):
        tokens = architecture.image_ids(tuple(size), count).count(c.IMAGE)
        one = getattr(architecture, "visual", tokens)
        sizes += [one] * (tokens // one)
    if turn.get("video"):
        tokens = sum(architecture.video_ids(tuple(turn["video"])).count(number) for number in (c.IMAGE, c.VIDEO))
        frames = 1 if name == "llava_onevision" else turn["video"][0]
        sizes += [tokens // frames] * frames
    return sizes + list(turn.get("audio", ()))


def inputs_of(name: str, row: dict[str, Any], line: Line) -> dict[str, Tensor]:
    """The keyword arguments of one row, [1, S] and its pixels or frames."""
    architecture, generator = zoo.ARCHITECTURES[name], torch.Generator().manual_seed(row["seed"] + 1)
    ids = torch.tensor([line.ids])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **architecture.token_types(ids)}
    turns = [of_turn(turn, None) for turn in row["turns"]]
    shown = [turn for turn in turns if turn.images or turn.video or turn.audio]
    if not shown:
        return made
    videos = [turn.video for turn in shown if turn.video]
    whole = Row(
        images=tuple(size for turn in shown for size in turn.images), video=videos[0] if videos else None,
        audio=tuple(length for turn in shown for length in turn.audio),
    )  # fmt: skip
    return made | architecture.pixels([whole], generator)


def joined(rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """Rows as one batch: what has a value for each token is padded, pixels lie one after another."""
    length = max(row["input_ids"].shape[1] for row in rows)
    by_row = any("pixel_attention_mask" in row for row in rows)
    batch: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key == "batch_num_images":
            parts = [row.get(key, torch.zeros(1, dtype=torch.long)) for row in rows]
        elif all(key in row and row[key].shape == row["input_ids"].shape for row in rows):
            parts = [padded(row[key], length, side) for row in rows]
        else:
            parts = [row[key] for row in rows if key in row]
            if by_row:  # a row of tiles for each row, of as many as the row with most of them
                parts = [row[key] if key in row else parts[0].new_zeros(parts[0].shape) for row in rows]
            most = [max(part.shape[dim] for part in parts) for dim in range(1, parts[0].ndim)]
            parts = [grown(part, most) for part in parts]
        batch[key] = torch.cat(parts)
    return batch


def padded(value: Tensor, length: int, side: str) -> Tensor:
    more = length - value.shape[1]
    return torch.nn.functional.pad(value, (more, 0) if side == "left" else (0, more))


def grown(value: Tensor, sizes: list[int]) -> Tensor:
    """Padded with zeros behind, in every dimension but the first."""
    more = [wanted - size for wanted, size in zip(sizes, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [each for size in reversed(more) for each in (0, size)])
