"""How an item's place in a prompt shrinks, and the positions that it had."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.serving.vllm import positions
from hawk_compile.serving.vllm.items import check_extent, check_inner, place_of

START, IMAGE, STOP, LINE = 4, 6, 5, 8
CPU = torch.device("cpu")


def test_the_ids_around_stay() -> None:
    full = [START, *[IMAGE] * 8, STOP]
    place = place_of(full, torch.tensor(full) == IMAGE)
    assert place is not None and place.count == 8
    ids, is_embed = place.shortened(3)
    assert ids == [START, *[IMAGE] * 3, STOP]
    assert is_embed is not None and is_embed(ids).tolist() == [False, True, True, True, False]


def test_text_between_visual_tokens_becomes_places_of_the_item() -> None:
    full = [START, *[IMAGE, IMAGE, LINE] * 3, STOP]
    place = place_of(full, torch.tensor(full) == IMAGE)
    assert place is not None and place.count == 6
    ids, is_embed = place.shortened(2)
    assert ids == [START, *[IMAGE] * 4, LINE, STOP], "the last line end stands behind all visual tokens"
    assert is_embed is not None and is_embed(ids).tolist() == [False, *[True] * 4, False, False]
    item = place.item([11, 12], 2)
    assert item.ids.tolist() == full and item.visual.tolist() == (torch.tensor(full) == IMAGE).tolist()
    assert place.text == [LINE, LINE] and place.visual.tolist() == [True, True, False] * 2 + [True, True]
    assert item.question.tolist() == [11, 12] and int(item.keep) == 2


def test_text_among_visual_tokens_is_refused_where_it_would_not_be_read_as_text() -> None:
    place, whole = place_of([IMAGE, LINE, IMAGE], torch.tensor([True, False, True])), place_of([IMAGE] * 2, None)
    assert place is not None and whole is not None
    check_inner(place, "")
    check_inner(whole, "they see each other")
    with pytest.raises(UnsupportedModelError, match=r"text between the visual tokens of one item, and they see each"):
        check_inner(place, "they see each other")


def test_all_of_it_visual_or_none() -> None:
    place = place_of([IMAGE] * 4, None)
    assert place is not None and place.shortened(1) == ([IMAGE], None)
    assert place_of([START, STOP], torch.tensor([False, False])) is None


def test_a_prompt_whose_gaps_there_is_no_room_for_is_refused() -> None:
    positions.check_reach(128, 128)
    with pytest.raises(InputError, match=r"whose positions stay: 129 more than .* room for 128; give fewer"):
        positions.check_reach(129, 128)


def test_an_item_of_which_positions_would_be_rounded_is_refused() -> None:
    check_extent(65535)
    with pytest.raises(InputError, match="of 65536 positions is longer than 65535: give fewer frames"):
        check_extent(65536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7).to(dtype)
    where = torch.tensor([[0, 255, 256, 300, 65535], [1, 2, 3, 4, 5], [9, 257, 511, 512, 40000]])
    carried = positions.with_positions(rows, where, 65535)
    assert carried.dtype == dtype and carried.shape == (5, 7 + positions.COLUMNS)
    plain, axes, extent = positions.taken_apart(carried, CPU)
    assert plain.equal(rows) and axes.equal(where) and extent.tolist() == [65535] * 5


@dataclass(frozen=True)
class Range:
    """As vLLM's PlaceholderRange."""

    offset: int
    length: int
    is_embed: Tensor | None = None

    def get_num_embeds(self) -> int:
        return self.length if self.is_embed is None else int(self.is_embed.sum())

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        """Of one run or none."""
        mask = torch.ones(self.length) if self.is_embed is None else self.is_embed
        where = mask.nonzero().flatten() + self.offset
        return [(int(where[0]), int(where[-1]))] if len(where) else []


@dataclass(frozen=True)
class Feature:
    mm_position: Range
    data: Any


def pruned_item(full: list[int], keep: int, offset: int) -> tuple[list[int], Feature]:
    mask = torch.tensor([number == IMAGE for number in full])
    place = place_of(full, mask)
    assert place is not None
    ids, is_embed = place.shortened(keep)
    fields = {name: SimpleNamespace(data=value) for name, value in place.item([], keep).fields().items()}
    return ids, Feature(Range(offset, len(ids), None if is_embed is None else is_embed(ids)), fields)


def whole_and_short(items: list[tuple[list[int], int]]) -> tuple[list[int], list[int], list[Feature]]:
    """A prompt with text around its items, whole and with items shortened."""
    whole, short, features = [50], [50], []
    for full, keep in items:
        ids, feature = pruned_item(full, keep, len(short))
        features.append(feature)
        whole += [*full, 60, 61]
        short += [*ids, 60, 61]
    return whole, short, features


ITEMS = [
    ([START, *[IMAGE] * 8, STOP], 3), ([IMAGE] * 5, 5), ([START, *[IMAGE, IMAGE, LINE] * 3, STOP], 2), ([IMAGE] * 4, 1)
]  # fmt: skip


def test_a_prompt_as_it_was() -> None:
    whole, short, features = whole_and_short(ITEMS)
    full, moved, columns = positions.expanded(short, features)
    assert full == whole
    assert len(columns) == len(short) and columns == sorted(columns)
    assert [whole[column] for column, number in zip(columns, short, strict=True) if number != IMAGE] == [
        number for number in short if number != IMAGE
    ]
    at = 1
    for (item, _), feature in zip(ITEMS, moved, strict=True):
        place = feature.mm_position
        assert (place.offset, place.length) == (at, len(item))
        seen = [True] * len(item) if place.is_embed is None else place.is_embed.tolist()
        assert seen == [number == IMAGE for number in item]
        at += len(item) + 2


def rows_of(full: list[int], chosen: list[int], width: int = 3) -> Tensor:
    """What the model returns for an item of which the visual tokens `chosen` are kept: positions count up."""
    mask = [number == IMAGE for number in full]
    first, last = mask.index(True), len(mask) - 1 - mask[::-1].index(True)
    visual = [place for place in range(first, last + 1) if mask[place]]
    stays = sorted([visual[each] for each in chosen] + [place for place in range(first, last) if not mask[place]])
    where = torch.tensor(stays).expand(3, -1) - first
    return positions.with_positions(torch.zeros(len(stays), width), where, last + 1 - first)


CHOSEN = [[1, 4, 7], [0, 1, 2, 3, 4], [0, 3], [2]]


@pytest.mark.parametrize("chunk", [1000, 7, 3, 1])
def test_positions_of_what_is_kept(chunk: int) -> None:
    """In one step or in chunks, each of which sees the rows of its own window; twice, as after a preemption."""
    whole, short, features = whole_and_short(ITEMS)
    _, _, columns = positions.expanded(short, features)
    known = torch.tensor(columns).expand(3, -1)
    rows = [rows_of(full, chosen) for (full, _), chosen in zip(ITEMS, CHOSEN, strict=True)]
    expected, at = list(columns), 0
    for feature, each in zip(features, rows, strict=True):
        place = feature.mm_position
        begin = place.offset + (0 if place.is_embed is None else place.is_embed.tolist().index(True))
        _, axes, _ = positions.taken_apart(each, CPU)
        start = columns[begin]
        expected[begin : begin + len(each)] = (axes[0] + start).tolist()
        at = begin
    for _ in range(2):
        for computed in range(0, len(short), chunk):
            window = []
            for feature, each in zip(features, rows, strict=True):
                place = feature.mm_position
                begin = place.offset + (0 if place.is_embed is None else place.is_embed.tolist().index(True))
                low, high = max(computed - begin, 0), min(computed + chunk - begin, len(each))
                if low < high:
                    window.append(each[low:high])
            plain, known, delta = positions.restored(window, torch.tensor(short), known, computed, {IMAGE}, {3})
            assert all(part.shape[1] == 3 for part in plain)
        assert known[0].tolist() == known[2].tolist() == expected
        assert delta == len(whole) - len(short)
    assert at


def test_an_item_at_the_end_of_a_prompt_counts_whole() -> None:
    """What is generated stands behind the item as it was, not behind its last kept token."""
    ids, feature = pruned_item([IMAGE] * 9, 2, 1)
    short = [50, *ids]
    _, _, columns = positions.expanded(short, [feature])
    rows = rows_of([IMAGE] * 9, [0, 3])
    known = torch.tensor(columns).expand(3, -1)
    _, known, delta = positions.restored([rows], torch.tensor(short), known, 0, {IMAGE}, {3})
    assert known[0].tolist() == [0, 1, 4]
    assert len(short) + delta == 10
