"""`bench --engine vllm` in the real engine: what is held and cached is what pruning leaves; no times are asserted."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.served.bench import bench_served
from hawk_compile.tools.served.measured import Line, Served
from hawk_compile.tools.served.table import tables

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

VISUAL, BLOCK = 256, 32
OPTIONS: dict[str, Any] = {"max_model_len": 1024, "block_size": BLOCK, "enforce_eager": True, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def found() -> Served:
    return bench_served(
        "tiny", ratios=(0.5, 0.8), tokens=(VISUAL,), text=40, rounds=1, requests=2, answer=4, options=OPTIONS
    )


def prompts(lines: list[Line]) -> dict[float, int]:
    return {line.ratio: line.answers[0].prompt_tokens for line in lines}


def test_prompts_and_blocks_of_every_ratio(found: Served) -> None:
    lines = found.of("ratios")
    length = prompts(lines)
    assert length == {ratio: length[0] - VISUAL + HawkConfig(ratio=ratio).kept(VISUAL) for ratio in (0, 0.5, 0.8)}
    assert found.block_size == BLOCK
    for line in lines:
        (answer,), (together,) = line.answers, line.together
        assert answer.blocks == -(-answer.prompt_tokens // BLOCK) and not answer.cached
        assert 0 < answer.encoder < answer.seconds
        assert together.tokens == 8
        # Each request's last token is read by no step.
        assert together.blocks == 2 * -(-(answer.prompt_tokens + 3) // BLOCK)


def test_what_the_prefix_cache_holds(found: Served) -> None:
    """All blocks up to the question where items are the same, none where another question makes another item."""
    cached = {(line.method, line.ratio, line.subject): line.answers[0].cached for line in found.of("prefixes")}
    assert {key: value for key, value in cached.items() if key[2] == "picture" and value} == {}
    for method in ("hawk", "divprune"):
        assert cached[method, 0, "another question"] >= VISUAL
        assert cached[method, 0.8, "next turn"] >= 64
    assert cached["hawk", 0.8, "another question"] == 0
    assert cached["divprune", 0.8, "another question"] == BLOCK


def test_videos_by_both(found: Served) -> None:
    hawk, evs = (prompts(found.of("video", method, subject="video")) for method in ("hawk", "EVS"))
    assert hawk[0.8] < hawk[0] / 2
    assert abs(evs[0.8] - hawk[0.8]) <= 1, "EVS rounds down"
    assert not found.notes


def test_the_tables_are_whole(found: Served) -> None:
    assert [len(rows) for _, _, rows in tables(found)] == [3, 12, 5]
    for _, headings, rows in tables(found):
        assert all(len(row) == len(headings) and all(row) for row in rows)
