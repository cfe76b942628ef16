"""The OpenAI server: many requests at once, bad ones, what its log and its metrics say, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.tools.demo.scenes import pick_questions
from tests.serving import load
from tests.serving.server import Server, serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

OPTIONS = ("--trust-request-mm-kwargs", "--limit-mm-per-prompt", '{"image": 2}', "--mm-processor-cache-gb", "0.1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.serving.checkpoints import KINDS

    return KINDS["qwen2_vl"](tmp_path_factory.mktemp("http") / "qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, checkpoint.parent / "server.log", *OPTIONS) as started:
        assert started.metric("hawk:visual_tokens_total") == 0, "vLLM measures with pictures of its own"
        yield started


def picture(number: int = 0, **more: Any) -> dict[str, Any]:
    data = io.BytesIO()
    pick_questions("test", number + 1, per_scene=1)[number][0].pil().save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}, **more}


def words(text: str = "what color is the triangle") -> dict[str, Any]:
    return {"type": "text", "text": text}


def prompt_tokens(server: Server, ratio: float | None = None) -> int:
    kwargs = {} if ratio is None else {"mm_processor_kwargs": {"hawk_ratio": ratio}}
    status, reply = server.chat([picture(), words()], **kwargs)
    assert status == 200, reply
    return int(reply["usage"]["prompt_tokens"])


def test_many_requests_of_many_kinds(server: Server, checkpoint: Path) -> None:
    """Nothing lost, nothing mixed up: every answer is that of `optimize`; clients that leave hold nothing."""
    asked = load.requests(60, seed=1)
    outcome = asyncio.run(load.all_answered(server, asked))
    reference = load.expected(checkpoint, asked, sorted(outcome.answers))
    wrong, largest = load.differences(outcome, reference)
    assert not outcome.other and not wrong and largest < 1e-4
    assert len(outcome.answers) + outcome.left == len(asked) and outcome.left > 5
    assert outcome.again <= server.log.read_text().count(load.DRIFT), "vLLM's own reason to send a request again"
    assert load.settled(server) and server.get("/health") == ""
    numbers = sorted(outcome.answers)
    others = {number: reference[other] for number, other in zip(numbers, numbers[1:] + numbers[:1], strict=True)}
    assert load.differences(outcome, others)[0], "answers that are mixed up would be seen"


@pytest.mark.parametrize(("kwargs", "message"), [
    *[({"hawk_ratio": ratio}, "hawk_ratio is the fraction of visual tokens removed and must be a number in [0, 1), got")
      for ratio in (80, -1, 1.0, "x", None, math.nan, True)],
    ({"hawk_ration": 0.5}, "mm_processor_kwargs has hawk_ration, which a request cannot set"),
    ({"hawk": {"ratio": 0.5}}, "mm_processor_kwargs has hawk, which a request cannot set"),
    ({"ratio": 0.5}, "mm_processor_kwargs has ratio, which a request cannot set"),
])  # fmt: skip
def test_a_ratio_that_cannot_be(server: Server, kwargs: dict[str, Any], message: str) -> None:
    """Refused, never another ratio in its stead, and the next request is served."""
    status, reply = server.chat([picture(), words()], mm_processor_kwargs=kwargs)
    assert status == 400 and message in reply["error"]["message"]
    assert prompt_tokens(server, 0.5) > prompt_tokens(server)


def test_a_placeholder_too_many(server: Server) -> None:
    status, reply = server.chat([picture(), words("<|image_pad|>")])
    assert status == 400 and "2 placeholders for 1 items of modality image" in reply["error"]["message"]


def test_a_refused_request_leaves_its_picture_to_the_next_one(server: Server) -> None:
    """It is refused when the picture is processed and cached, and the engine, which has a cache beside that one, never
    sees it. The text alone differs, not the question: what stands for visual tokens asks nothing."""
    status, reply = server.chat([picture(3), words("which digit is red <|video_pad|>")])
    assert status == 400 and "stands for visual tokens: leave it out" in reply["error"]["message"]
    drifts = server.log.read_text().count(load.DRIFT)
    status, reply = server.chat([picture(3), words("which digit is red")])
    assert status == 200 and server.log.read_text().count(load.DRIFT) == drifts, reply


def test_a_picture_that_has_a_name_is_another_item_for_another_question(server: Server) -> None:
    """vLLM takes the name for what a picture is."""
    replies = [
        server.chat([picture(uuid=name), words(text)], logprobs=True, max_tokens=4, min_tokens=4)[1]
        for name in ("a", None) for text in ("what color is the triangle", "which digit is red")
    ]  # fmt: skip
    found = [[each["logprob"] for each in reply["choices"][0]["logprobs"]["content"]] for reply in replies]
    assert found[:2] == [pytest.approx(each, abs=1e-4) for each in found[2:]] and found[0] != found[1]


def test_metrics_count_visual_tokens(server: Server) -> None:
    def totals() -> tuple[float, float]:
        return server.metric("hawk:visual_tokens_total"), server.metric("hawk:kept_visual_tokens_total")

    came, kept = totals()
    whole = prompt_tokens(server, 0)
    assert totals()[0] - came == totals()[1] - kept > 0
    visual = totals()[0] - came
    pruned = prompt_tokens(server)
    assert totals()[0] - came == 2 * visual and totals()[1] - kept - visual == visual - (whole - pruned)


def test_the_end(server: Server) -> None:
    """The last test: Ctrl-C reaches the server, and the log tells of what no line had told of."""
    came = int(server.metric("hawk:visual_tokens_total"))
    assert server.end() in (0, 130)
    log = server.log.read_text()
    assert "is served pruned, with {'ratio': 0.8}" in log
    told = [int(line.partition("images and videos, ")[2].split()[0]) for line in log.splitlines() if "came in" in line]
    assert sum(told) == came > 0
