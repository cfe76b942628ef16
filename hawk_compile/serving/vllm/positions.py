"""Positions of what is kept: those that it had in the whole prompt.

vLLM asks a model twice. Before anything is encoded it wants the positions of all of a prompt: text has its own from the
start, the places of an item stand in for them. When an item's embeddings are taken from the cache of encoder outputs,
it wants them again, and by then it is known which tokens were kept: their positions, counted from the item's start,
travel with the embeddings, as digits in columns behind them.

    embedding [n, D]  ->  [n, D + 8]: three axes and the item's extent, each as two digits of base 256

A bfloat16 holds whole numbers up to 256 exactly, and an item may be moved to another place of another prompt, so
neither numbers nor positions from the prompt's start would do.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import InputError
from hawk_compile.serving.vllm.items import place_of

BASE = 256
AXES = 3
COLUMNS = 2 * (AXES + 1)
PLAIN = (1, 0, 0)
"""The section of axes that the configuration of a model without any is given, beside its rotary embedding's own."""


def is_plain(config: Any) -> bool:
    """Whether a checkpoint's configuration was given axes: its decoder has none, so that positions count all tokens."""
    return getattr(config, "mrope_section", None) == list(PLAIN)


def room(plain: bool, most: int) -> int:
    """How many positions more than `most` tokens, the longest prompt with its answer, the rotary embeddings hold: as
    many of a decoder without axes; of others, whose pictures take fewer positions than tokens, what vLLM makes."""
    return most if plain else 3 * most


def check_reach(gaps: int, most: int) -> None:
    """Refuse a prompt whose answer would run past the end of the decoder's positions.

    Args:
        gaps: how many positions the items of a prompt take more than tokens are left of them.
        most: how many there is room for.

    Raises:
        InputError: such a prompt.
    """
    if gaps > most:
        raise InputError(
            f"visual tokens of this prompt would be removed, whose positions stay: {gaps} more than there are tokens "
            f"left, and there is room for {most}; give fewer or smaller pictures or a lower ratio, or start the server "
            "with a larger max_model_len"
        )


def with_positions(rows: Tensor, positions: Tensor, extent: int) -> Tensor:
    """Embeddings [n, D] with their positions [3, n] from the item's start, of the same device, and how many positions
    the item takes."""
    numbers = torch.cat([positions, torch.full_like(positions[:1], extent)]).T  # [n, 4]
    return torch.cat([rows, torch.cat([numbers // BASE, numbers % BASE], 1).to(rows.dtype)], 1)


def taken_apart(rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings [n, D], positions [3, n] from the item's start, extent [n]) of what `with_positions` made; the last
    two on `device`, by one copy."""
    digits = rows[:, -COLUMNS:].to(device).round().long()
    numbers = (digits[:, : AXES + 1] * BASE + digits[:, AXES + 1 :]).T
    return rows[:, :-COLUMNS], numbers[:AXES], numbers[AXES]


def expanded(tokens: Sequence[int], features: Sequence[Any]) -> tuple[list[int], list[Any], list[int]]:
    """A prompt as it was before its items shrank.

    Args:
        tokens: the prompt with shortened items.
        features: its items in the order of the prompt; see `vllm.multimodal.inputs.MultiModalFeatureSpec`.

    Returns:
        The whole prompt, its items there, and where in it each position of the short prompt stands: the first places
        of an item stand in for those that will be kept.
    """
    full: list[int] = []
    columns: list[int] = []
    moved, read = [], 0
    for feature in features:
        place = feature.mm_position
        if feature.data is None or "hawk_keep" not in feature.data:
            stop = place.offset + place.length
            columns += range(len(full), len(full) + stop - read)
            shift = len(full) - read
            full += tokens[read:stop]
            moved.append(replace(feature, mm_position=replace(place, offset=place.offset + shift)))
            read = stop
            continue
        item = place_of(feature.data["hawk_ids"].data.tolist(), feature.data["hawk_visual"].data)
        assert item is not None
        places = place.get_num_embeds()
        start = len(full) + place.offset - read
        # What stands around its visual tokens is the prompt's: checkpoints join ends of lines there, of two items too.
        begin = place.offset + len(item.before)
        columns += range(len(full), start + len(item.before) + places)
        full += [*tokens[read:begin], *item.inner]
        mask = None if bool(item.all_visual.all()) else item.all_visual
        moved.append(replace(feature, mm_position=replace(place, offset=start, length=len(item.ids), is_embed=mask)))
        read = begin + places
    columns += range(len(full), len(full) + len(tokens) - read)
    full += tokens[read:]
    return full, moved, columns


def start_of(ids: Tensor, place: int) -> int:
    """Where the run of equal ids begins in which a place stands: an item's, since items do not touch."""
    other = (ids[:place] != ids[place]).nonzero()
    return int(other[-1]) + 1 if len(other) else 0


def restored(
    embeddings: Sequence[Tensor], ids: Tensor, before: Tensor, computed: int, places: set[int], widths: set[int]
) -> tuple[list[Tensor], Tensor, int]:
    """Embeddings without what travelled behind them, and the positions of a prompt with theirs.

    Args:
        embeddings: of the items that this step reads, [n, D + 8] or, of items of which nothing was removed, [n, D].
        ids: [S] int64 on the host, the short prompt.
        before: [3, S], its positions as they are known until now.
        computed: positions that earlier steps have read.
        places: the ids that stand for places of items.
        widths: every D that there is: encoders of one model may differ.

    Returns:
        embeddings [n, D]; positions [3, S]; what is added to a later slot to have its position.
    """
    after = before.clone()
    held = torch.zeros(len(ids), dtype=torch.bool)
    for number in places:
        held |= ids == number
    waiting = held.nonzero().flatten()
    waiting = waiting[waiting >= computed]
    end = int(before[:, -1].max()) + 1  # of an item's place: no more than the item's own
    plain, done = [], 0
    for rows in embeddings:
        where = waiting[done : done + len(rows)]
        done += len(rows)
        if rows.shape[1] in widths:
            plain.append(rows)
            end = max(end, int(before[:, where].max()) + 1)
            continue
        kept, axes, extent = taken_apart(rows, after.device)
        plain.append(kept)
        start = start_of(ids, int(where[0]))
        base = int(before[0, start - 1]) + 1 if start else 0
        after[:, where.to(after.device)] = axes.to(after) + base
        end = max(end, base + int(extent.max()))
    return plain, after, end - len(ids)
