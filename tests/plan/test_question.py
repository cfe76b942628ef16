"""Which text votes, and how much is kept, against plain-Python oracles of the written rules."""

from __future__ import annotations

import json
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hawk_compile.errors import InputError
from hawk_compile.plan.plan import make_plan
from hawk_compile.plan.question import QuerySource, SpecialIds, voting_text
from hawk_compile.settings.config import HawkConfig

VISUAL, VISION_END, TURN, OTHER_TURN, PAD = 4, 7, 3, 1, 0
IDS = SpecialIds(vision_end=(VISION_END,), end_of_turn=(TURN, OTHER_TURN), special=(PAD, OTHER_TURN, 2, TURN, 4, 6, 7))
a_row = st.lists(
    st.sampled_from([PAD, OTHER_TURN, 2, TURN, VISUAL, VISUAL, VISUAL, 6, VISION_END, 50, 51, 52]), max_size=24
)


def oracle(ids: list[int], real: list[bool], special: SpecialIds) -> tuple[set[int], QuerySource]:
    """The rule of `hawk_compile.plan.question`, for one row: positions that vote, and where they came from."""
    places = range(len(ids))
    text = {i for i in places if real[i] and ids[i] != VISUAL}
    last_visual = max((i for i in places if ids[i] == VISUAL), default=-1)
    start = max([last_visual, *(i for i in places if ids[i] in special.vision_end and real[i])])
    ends = [i for i in places if ids[i] in special.end_of_turn and real[i]]
    stop = ends[-1] if ends and ends[-1] > start else len(ids)
    after = {i for i in text if start < i < stop}
    if after:
        return after, QuerySource.AFTER_IMAGE
    opened = max((i for i in ends if i < last_visual), default=-1)
    turn = {i for i in text if opened < i < stop and ids[i] not in special.special}
    if turn:
        return turn, QuerySource.TURN
    return text, QuerySource.ANY_TEXT


@settings(max_examples=300, deadline=None)
@given(st.lists(a_row, min_size=1, max_size=4), st.data())
def test_voting_text(rows: list[list[int]], data: st.DataObject) -> None:
    length = max(1, *map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    if data.draw(st.booleans()):
        real, ids = real.flip(1), ids.flip(1)
    votes, source = voting_text(ids, ids == VISUAL, real, IDS)
    for row in range(len(rows)):
        wanted, origin = oracle(ids[row].tolist(), real[row].tolist(), IDS)
        assert votes[row].nonzero()[:, 0].tolist() == sorted(wanted)
        assert source[row] == origin


@pytest.mark.parametrize(("ids", "wanted", "origin"), [
    ([2, 50, 6, 4, 4, 7, 51, 52, 3, 16], [6, 7], QuerySource.AFTER_IMAGE),  # the template's tail has no voice
    ([2, 50, 6, 4, 4, 7, 51, 52], [6, 7], QuerySource.AFTER_IMAGE),  # no end of turn: all that follows
    ([2, 50, 51, 6, 4, 4, 7, 3, 16], [1, 2], QuerySource.TURN),  # the question stands before the image
    ([50, 51, 3, 52, 6, 4, 7, 3], [3], QuerySource.TURN),  # an earlier turn is over
    ([2, 6, 4, 7, 3], [0, 1, 3, 4], QuerySource.ANY_TEXT),
    ([2, 4, 4, 7, 50, 4, 7, 51, 3, 52, 3], [7, 8, 9], QuerySource.AFTER_IMAGE),  # up to the last end of a turn
    ([4, 4, 51], [2], QuerySource.AFTER_IMAGE),
])  # fmt: skip
def test_examples(ids: list[int], wanted: list[int], origin: QuerySource) -> None:
    votes, source = voting_text(torch.tensor([ids]), torch.tensor([ids]) == VISUAL, torch.ones(1, len(ids)).bool(), IDS)
    assert votes[0].nonzero()[:, 0].tolist() == wanted and source.tolist() == [origin]


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 5000), st.decimals(0, Decimal("0.9999"), places=4))
def test_kept_count(count: int, ratio: Decimal) -> None:
    """In decimals, not in floats: 0.7 of 10 removed leaves 3, and (1 - 0.7) * 10 in floats is 3.0000000000000004."""
    exact = (count * (1 - ratio)).to_integral_value(ROUND_CEILING)
    assert HawkConfig(ratio=float(ratio)).kept(count) == (max(1, int(exact)) if count else 0)


def test_kept_count_of_thirds() -> None:
    assert HawkConfig(ratio=1 / 3).kept(9) == 6
    assert HawkConfig(ratio=0.7).kept(10) == 3
    assert HawkConfig(ratio=0.999999).kept(1) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(1, 5)), min_size=1, max_size=4),
       st.decimals(0, Decimal("0.99"), places=2), st.booleans())
def test_plan(rows: list[tuple[int, int, int]], ratio: Decimal, left: bool) -> None:
    """Rows of (text, visual, text) tokens, padded: each keeps its own count, and S' is what the longest row needs."""
    lines = [[50] * before + [VISUAL] * visual + [51] * after for before, visual, after in rows]
    length = max(map(len, lines))
    padded = [[PAD] * (length - len(line)) + line if left else line + [PAD] * (length - len(line)) for line in lines]
    ids = torch.tensor(padded)
    mask = (ids != PAD).long()
    total = sum(visual for _, visual, _ in rows)
    plan = make_plan(ids, ids == VISUAL, mask, total, IDS, HawkConfig(ratio=float(ratio)))
    kept = [max(1, int((v * (1 - ratio)).to_integral_value(ROUND_CEILING))) if v else 0 for _, v, _ in rows]
    assert plan.visual == [visual for _, visual, _ in rows]
    assert plan.kept == kept == plan.budget.tolist()
    needed = [len(line) - visual + keep for line, (_, visual, _), keep in zip(lines, rows, kept, strict=True)]
    assert plan.length == (length if kept == plan.visual else max(needed))
    assert plan.filled == any(each != plan.length for each in needed)
    assert plan.padded == any(len(line) != length for line in lines)
    for extra in (-1, 1):
        if total + extra >= 0:
            with pytest.raises(InputError, match=f"has {total} placeholders .* but {total + extra} visual features"):
                make_plan(ids, ids == VISUAL, mask, total + extra, IDS, HawkConfig(ratio=float(ratio)))


def test_later_positions_do_not_vote() -> None:
    ids = torch.tensor([[2, 4, 4, 51, 52, 53]])
    plan = make_plan(ids, ids == VISUAL, None, 2, IDS, HawkConfig(ratio=0.5), 4)
    assert plan.votes.nonzero()[:, 1].tolist() == [3]


@pytest.mark.parametrize("case", ["case00", "case01", "case02", "case03"])
def test_golden_voters(case: str) -> None:
    """With these voters, the formula in float64 keeps what the reference implementation kept."""
    with safe_open(Path(__file__).parents[1] / "golden" / "layer0.safetensors", "pt") as file:
        named = json.loads(file.metadata()[case])
        names = [name for name in file.keys() if name.startswith(case)]  # noqa: SIM118
        held = {name.split(".")[1]: file.get_tensor(name) for name in names}
    ids = held.pop("input_ids")
    visual = ids == named["image_token_id"]
    special = SpecialIds((named["vision_end_token_id"],), (named["end_of_turn_token_id"],), ())
    votes, source = voting_text(ids, visual, torch.ones_like(visual), special)
    assert source.tolist() == [QuerySource.AFTER_IMAGE]
    hidden = held["hidden"][0].double()
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + named["rms_eps"]).rsqrt() * held["norm_weight"].double()
    heads, kv_heads = named["heads"], named["kv_heads"]
    query = (normed[votes[0]].mean(0) @ held["wq"].double().T + held["bq"].double()).unflatten(0, (heads, -1))
    key = (normed[visual[0]] @ held["wk"].double().T + held["bk"].double()).unflatten(1, (kv_heads, -1))
    raw = torch.einsum("hd,vhd->vh", query, key.repeat_interleave(heads // kv_heads, 1))
    total = (raw / raw.norm(dim=0)) @ held["head_weights"].double()
    count = HawkConfig(ratio=float(1 - Decimal(str(named["keep_ratio"])))).kept(len(total))
    places = visual[0].nonzero()[:, 0][total.topk(count).indices]
    keep = (~visual[0]).index_fill(0, places, True).nonzero()[:, 0]
    assert keep.equal(held["keep_indices"].flatten().long())
