"""Which text of one turn votes, what a call says of it, and how much is kept; conversations are in test_chat.py."""

from __future__ import annotations

import json
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig

from hawk_compile.errors import InputError
from hawk_compile.plan.given import mask_of_ids
from hawk_compile.plan.ids import SpecialIds, special_ids_of
from hawk_compile.plan.plan import make_plan
from hawk_compile.plan.question import Question, each_image_apart, find_question
from hawk_compile.plan.row import QuerySource, QuestionRule
from hawk_compile.settings.config import HawkConfig

VISUAL, VISION_END, TURN, OTHER_TURN, PAD = 4, 7, 3, 1, 0
IDS = SpecialIds(vision_end=(VISION_END,), end_of_turn=(TURN, OTHER_TURN), special=(PAD, OTHER_TURN, 2, TURN, 4, 6, 7))
a_row = st.lists(
    st.sampled_from([PAD, OTHER_TURN, 2, TURN, VISUAL, VISUAL, VISUAL, 6, VISION_END, 50, 51, 52]), max_size=24
)


def question_of(row: list[int], special: SpecialIds = IDS) -> tuple[list[int], QuerySource]:
    """The places that vote in one row without padding, and where they stand."""
    ids = torch.tensor([row])
    found = find_question(ids, ids == VISUAL, torch.ones_like(ids).bool(), special)
    return found.mask[0].nonzero()[:, 0].tolist(), found.source[0]


@settings(max_examples=300, deadline=None)
@given(st.lists(a_row, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_any_prompt(rows: list[list[int]], left: bool, own: bool) -> None:
    """Text alone votes, some of it wherever there is any; padding and other rows change nothing."""
    length = max(1, *map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row if left
                        else row + [PAD] * (length - len(row)) for row in rows])  # fmt: skip
    real = torch.tensor([[False] * (length - len(row)) + [True] * len(row) if left
                         else [True] * len(row) + [False] * (length - len(row)) for row in rows])  # fmt: skip
    visual = (ids == VISUAL) & real
    found = find_question(ids, visual, real, IDS, own=own)
    votes = found.mask if found.images is None else found.mask.any(1)
    text = real & ~visual
    assert not (votes & ~text).any()
    assert votes.any(1).equal(text.any(1))
    if found.images is not None:
        assert found.images.sum(1).equal(visual.long()), "every visual token is scored by one question"
    if not own:
        for row, mask, there, source in zip(rows, votes, real, found.source, strict=True):
            alone = question_of(row) if row else ([], QuerySource.ANY_TEXT)
            assert (mask[there].nonzero()[:, 0].tolist(), source) == alone


@pytest.mark.parametrize(("ids", "wanted", "origin"), [
    ([2, 50, 6, 4, 4, 7, 51, 52, 3, 16], [6, 7], QuerySource.AFTER_IMAGE),  # the template's tail has no voice
    ([2, 50, 6, 4, 4, 7, 51, 52], [6, 7], QuerySource.AFTER_IMAGE),  # no end of turn: all that follows
    ([2, 50, 51, 6, 4, 4, 7, 3, 16], [1, 2], QuerySource.TURN),  # the question stands before the image
    ([50, 51, 3, 52, 6, 4, 7, 3], [3], QuerySource.TURN),  # an earlier turn is over
    ([2, 6, 4, 7, 3], [0, 1, 3, 4], QuerySource.ANY_TEXT),
    ([2, 4, 4, 7, 50, 4, 7, 51, 3, 52, 3], [9], QuerySource.AFTER_IMAGE),  # the last turn
    ([2, 6, 4, 7, 50, 51, 3, 60, 61, 3, 2, 3], [4, 5], QuerySource.EARLIER_TURN),  # special ids are no text
    ([2, 4, 4, 50, 51, 3, 60, 61, 62], [6, 7, 8], QuerySource.AFTER_IMAGE),  # the id closes answers only
    ([2, 4, 4, 7, 50, 51, 3, 60, 61, 62], [4, 5], QuerySource.AFTER_IMAGE),  # a header, as in models that name id 7
    ([2, 50, 51, 52, 4, 4, 53, 54], [6, 7], QuerySource.AFTER_IMAGE),
    ([2, 20, 21, 22, 50, 51, 52, 4, 4, 53, 3, 20, 23, 22], [4, 5, 6, 9], QuerySource.TURN),  # 53 may close the image
    ([4, 4, 51], [2], QuerySource.AFTER_IMAGE),
    ([4, 50, 51, 4, 52, 53, 54, 55, 56, 4, 7], [4, 5, 6, 7, 8], QuerySource.TURN),  # a gap, and text between images
])  # fmt: skip
def test_examples(ids: list[int], wanted: list[int], origin: QuerySource) -> None:
    assert question_of(ids) == (wanted, origin)


def given_votes(config: HawkConfig | None = None, **asked: Any) -> list[list[int]]:
    ids = torch.tensor([[2, 4, 4, 50, 51, 3, 60, 50, 51, 3], [0, 0, 2, 4, 4, 4, 53, 54, 3, 16]])
    real = ids != PAD
    plan = make_plan(ids, ids == VISUAL, real, 5, IDS, config or HawkConfig(ratio=0.5), **asked)
    assert plan.question.source == [QuerySource.GIVEN] * 2 and plan.question.rule == [QuestionRule.GIVEN] * 2
    return [mask.nonzero()[:, 0].tolist() for mask in plan.question_mask]


def test_the_time_of_a_videos_last_frame_is_no_question() -> None:
    """It stands behind that frame's end and in front of the video's."""
    named = PreTrainedConfig(image_end_token_id=VISION_END, video_end_token_id=6)
    special = special_ids_of(named, GenerationConfig(), HawkConfig())
    frame, seconds = [VISUAL, VISUAL, VISION_END], [60, 61]
    row = [40, *frame, *seconds, *frame, *seconds, 6, 50, 51, 52]
    assert question_of(row, special) == ([12, 13, 14], QuerySource.AFTER_IMAGE)


def test_times_between_frames_are_no_question() -> None:
    """Where it stands in front of the video; what is asked between two pictures is one."""
    frame = [VISUAL, VISUAL, VISION_END]
    times = [[60, number, 61, 62, 63] for number in (50, 51, 52)]
    row = [40, 41, 42, *frame, *times[0], *frame, *times[1], *frame, *times[2], *frame]
    assert question_of(row) == ([0, 1, 2], QuerySource.TURN)
    row[6:11] = range(70, 75)
    assert question_of(row) == ([0, 1, 2, 6, 7, 8, 9, 10], QuerySource.TURN)
    alone = [40, 41, 42, *frame, *times[0], *frame]
    assert question_of(alone) == ([0, 1, 2, 6, 7, 8, 9, 10], QuerySource.TURN)


def test_a_mask_says_who_votes() -> None:
    """Before what the settings say; visual tokens and padding in it do not count."""
    mask = torch.zeros(2, 10, dtype=torch.long)
    mask[0, 3:5], mask[1, :7] = 1, 1
    for config in (HawkConfig(ratio=0.5), HawkConfig(ratio=0.5, question="own")):
        assert given_votes(config, question_mask=mask) == [[3, 4], [2, 6]]
    with pytest.raises(InputError, match="holds none of row 1"):
        given_votes(question_mask=mask * torch.tensor([[1], [0]]))


def test_ids_say_who_votes() -> None:
    """The last place in the row; padding and special ids around them do not count."""
    ids = torch.tensor([[2, 4, 4, 50, 51, 3, 60, 50, 51, 3], [0, 0, 2, 4, 4, 4, 53, 54, 3, 16]])
    real = ids != PAD
    for wanted in ([[50, 51], [53]], torch.tensor([[2, 50, 51], [-1, 53, PAD]])):
        mask = mask_of_ids(ids, real, wanted, IDS)
        assert [row.nonzero()[:, 0].tolist() for row in mask] == [[7, 8], [6]]
    with pytest.raises(InputError, match=r"question_ids of row 1, \[54, 53\], does not stand in that row"):
        mask_of_ids(ids, real, [[50], [54, 53]], IDS)
    with pytest.raises(InputError, match="of row 0"):
        mask_of_ids(ids, real, [[], [53]], IDS)
    with pytest.raises(InputError, match="each of the 2 rows, got 1"):
        mask_of_ids(ids, real, [[50]], IDS)
    with pytest.raises(InputError, match="a list of ids for each row"):
        mask_of_ids(ids, real, [50, 53], IDS)


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
    assert plan.question_mask.nonzero()[:, 1].tolist() == [3]


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
    found = find_question(ids, visual, torch.ones_like(visual), special)
    assert found.source == [QuerySource.AFTER_IMAGE]
    hidden = held["hidden"][0].double()
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + named["rms_eps"]).rsqrt() * held["norm_weight"].double()
    heads, kv_heads = named["heads"], named["kv_heads"]
    query = (normed[found.mask[0]].mean(0) @ held["wq"].double().T + held["bq"].double()).unflatten(0, (heads, -1))
    key = (normed[visual[0]] @ held["wk"].double().T + held["bk"].double()).unflatten(1, (kv_heads, -1))
    raw = torch.einsum("hd,vhd->vh", query, key.repeat_interleave(heads // kv_heads, 1))
    total = (raw / raw.norm(dim=0)) @ held["head_weights"].double()
    count = HawkConfig(ratio=float(1 - Decimal(str(named["keep_ratio"])))).kept(len(total))
    places = visual[0].nonzero()[:, 0][total.topk(count).indices]
    keep = (~visual[0]).index_fill(0, places, True).nonzero()[:, 0]
    assert keep.equal(held["keep_indices"].flatten().long())


def test_the_image_has_its_own_question_behind_a_video_that_stays_whole() -> None:
    """video, its question, image, its question: where images alone are pruned, one is left, which is not the first."""
    first, second = [0, 1, 0, 0], [0, 0, 0, 1]
    seen = [[1, 0, 0, 0], [0, 0, 1, 0]]
    source, rule = [QuerySource.TURN], [QuestionRule.TEMPLATE]
    question = Question(torch.tensor([[first, second]]).bool(), torch.tensor([seen]).bool(), source, rule)
    apart = each_image_apart(question, torch.tensor([[-1, -1, 0, -1]]))
    assert apart.mask.int().tolist() == [second] and apart.images is None
    whole = each_image_apart(question, torch.tensor([[-1, -1, -1, -1]]))
    assert whole.mask.int().tolist() == [first]
    both = each_image_apart(question, torch.tensor([[0, -1, 1, -1]]))
    assert both.mask.int().tolist() == [[first, second]] and both.images.int().tolist() == [seen]
