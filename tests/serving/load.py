"""Many requests of many kinds at once to `hawk-compile serve`, each answer held to what `optimize` answers.

    python -m tests.serving.load --requests 1000 [--checkpoint FOLDER] [--control leak] [vLLM's arguments]

Pictures of the demo in random sizes, one or two, in one or two turns, or none; ratios of their own or the server's;
streamed or not, some under a name (`uuid`) by which vLLM knows a picture again; and clients that go away before the
answer, or in the middle of it. It exits 1 if an answer is another one, or none, or if a process of the server grows.
With `--control leak` each request leaves a little behind, and it must exit 1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hawk_compile.tools.demo.run import MODEL
from hawk_compile.tools.demo.scenes import pick_questions
from tests.serving.cases import Asked
from tests.serving.engine import ALONE, TOKENS, Answer, optimised
from tests.serving.server import Server, serving

AT_ONCE = 8
OWN: float = 0.8
"""The server's ratio."""
RATIOS = (None, 0.0, 0.5, 0.8, 0.9)
LONG = 300
"""Tokens of an answer that its client does not wait for."""
AGAIN = "InternalServerError"
"""In an answer of vLLM's to a request whose picture stands in one of its two caches of processed items and not in the
other, for a client that left in between. Its log then speaks of a cache drift, and the request is to be sent again."""
DRIFT, MOST_AGAIN = "cache drift", 20
STEADY = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16",
}  # fmt: skip
"""Of the server: what is freed goes back to the system, where glibc keeps it in pieces by default, and PyTorch's caches
of kernels for CPUs hold few shapes: as it is by default they grow with each new length of a prompt."""
GROWTH = 8.0
"""MiB by which a process may grow over the last half of `ENOUGH` requests or more; before, not all kinds have come, and
caches of bounded size fill."""
ENOUGH = 2000
MEASUREMENTS = 200
"""Of memory."""
LEAK = {"leak": ["--middleware", "tests.serving.leak.Leak"]}
SIDES = (140, 168, 196, 252)


@dataclass(frozen=True)
class Request(Asked):
    """What a client asks, and how.

    Attributes:
        turns: of the conversation, each with its pictures and its text; what the assistant said is made up.
        ratio: of the request; None: the server's.
        leaves: seconds after which its client goes away, or -1: it does with the first token; None: it waits.
    """

    turns: list[tuple[list[Image.Image], str]]
    ratio: float | None
    streamed: bool
    leaves: float | None
    named: bool

    @property
    def images(self) -> list[Image.Image]:
        return [image for images, _ in self.turns for image in images]

    def messages(self, picture: Any) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        for number, (images, text) in enumerate(self.turns):
            if number:
                said.append({"role": "assistant", "content": [{"type": "text", "text": " red"}]})
            words = [f" {text}"] * max(1, len(images))
            parts = [part for image, word in zip(images, words, strict=False)
                     for part in (picture(image), {"type": "text", "text": word})]  # fmt: skip
            said.append({"role": "user", "content": parts or [{"type": "text", "text": text}]})
        return said

    def rendered(self, processor: Any) -> str:
        turns = self.messages(lambda image: {"type": "image"})
        return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def body(self) -> dict[str, Any]:
        tokens = TOKENS if self.leaves is None else LONG
        asked: dict[str, Any] = {
            "messages": self.messages(self.part), "temperature": 0, "max_tokens": tokens, "min_tokens": tokens,
            "logprobs": True, "return_token_ids": True, "stream": self.streamed,
        }  # fmt: skip
        if self.streamed:
            asked["stream_options"] = {"include_usage": True}
        if self.ratio is not None:
            asked["mm_processor_kwargs"] = {"hawk_ratio": self.ratio}
        return asked

    def part(self, image: Image.Image) -> dict[str, Any]:
        data = io.BytesIO()
        image.save(data, "PNG")
        text = base64.b64encode(data.getvalue()).decode()
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}
        return {**part, "uuid": f"picture-{hash(image.tobytes())}"} if self.named else part


def requests(count: int, seed: int) -> list[Request]:
    """A random mixture. Pictures and questions come again, and then not together."""
    draw = random.Random(seed)
    pool = [
        (scene.pil().resize((draw.choice(SIDES), draw.choice(SIDES))), [question.text for question in scene.questions])
        for scene, _ in pick_questions("test", max(4, count // 10), per_scene=1)
    ]

    def turn(pictures: int) -> tuple[list[Image.Image], str]:
        chosen = [draw.choice(pool) for _ in range(max(1, pictures))]
        return [image for image, _ in chosen][:pictures], draw.choice(chosen[0][1])

    made = []
    for _ in range(count):
        pictures = draw.choice([[0], [1], [1], [1], [2], [1, 0], [1, 1]])
        leaves = draw.choice([None] * 7 + [draw.uniform(0, 0.05), draw.uniform(0.05, 0.5), -1.0])
        made.append(Request(
            [turn(number) for number in pictures], draw.choice(RATIOS), draw.random() < 0.5 or leaves == -1.0, leaves,
            draw.random() < 0.2,
        ))  # fmt: skip
    return made


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        answers: by the request's number; of those whose clients left there is none.
        left: how many clients left.
        again: how often a request was sent again.
        other: what the server answered that is no answer.
        memory: MiB by process, as requests go by.
    """

    answers: dict[int, Answer]
    left: int
    again: int
    other: list[str]
    memory: list[dict[str, float]]
    seconds: float


async def all_answered(server: Server, asked: list[Request]) -> Outcome:
    import aiohttp

    outcome = Outcome({}, 0, 0, [], [], 0.0)
    free = asyncio.Semaphore(AT_ONCE)
    begun = time.monotonic()
    every = max(1, len(asked) // MEASUREMENTS)
    # A connection for each: the server closes one that idles, and what is sent on it then is lost.
    alone = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300), connector=alone) as session:

        async def one(number: int, request: Request) -> None:
            async with free:
                said = await ask(session, server.url, request)
                while isinstance(said, str) and AGAIN in said and outcome.again < MOST_AGAIN:
                    outcome.again += 1
                    said = await ask(session, server.url, request)
            if said is None:
                outcome.left += 1
            elif isinstance(said, str):
                outcome.other.append(f"{number}: {said}")
            else:
                outcome.answers[number] = said
            if (outcome.left + len(outcome.other) + len(outcome.answers)) % every == 0:
                outcome.memory.append(resident(server))

        await asyncio.gather(*[one(number, request) for number, request in enumerate(asked)])
        outcome.seconds = time.monotonic() - begun
    return outcome


async def ask(session: Any, url: str, request: Request) -> Answer | str | None:
    """The answer, or what came in its stead; None: the client left."""
    limit = request.leaves if request.leaves is not None and request.leaves >= 0 else None
    try:
        async with asyncio.timeout(limit), session.post(f"{url}/v1/chat/completions", json=request.body()) as reply:
            if request.leaves == -1.0 and reply.status == 200:
                await reply.content.readline()
                reply.close()
                return None
            text = await reply.text()
    except TimeoutError:
        return None
    if reply.status != 200 or '"error": {' in text:
        return f"{reply.status} {text[-500:]}"
    if request.leaves is not None:
        return None  # all of a long answer, before it left
    return streamed(text) if request.streamed else whole(json.loads(text))


def resident(server: Server) -> dict[str, float]:
    """MiB in memory of each of the server's processes, but for what they share: a ring for messages fills once."""
    import psutil

    first = psutil.Process(server.process.pid)
    memory: dict[str, float] = {}
    for process in [first, *first.children(recursive=True)]:
        try:
            seen = process.memory_info()
            memory[f"{process.name()} {process.pid}"] = (seen.rss - seen.shared) / 2**20
        except psutil.NoSuchProcess:
            continue
    return memory


def whole(reply: dict[str, Any]) -> Answer:
    choice = reply["choices"][0]
    found = [each["logprob"] for each in choice["logprobs"]["content"]]
    return Answer(choice["token_ids"], found, reply["usage"]["prompt_tokens"])


def streamed(text: str) -> Answer:
    ids: list[int] = []
    found: list[float] = []
    prompt = 0
    for line in text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        prompt = (event.get("usage") or {}).get("prompt_tokens", prompt)
        for choice in event["choices"]:
            ids += choice.get("token_ids") or []
            found += [each["logprob"] for each in (choice.get("logprobs") or {}).get("content") or []]
    return Answer(ids, found, prompt)


def expected(checkpoint: Path, asked: list[Request], numbers: list[int]) -> dict[int, Answer]:
    """What `optimize` answers to each, one at a time."""
    answers: dict[int, Answer] = {}
    for ratio in {asked[number].ratio for number in numbers}:
        group = [number for number in numbers if asked[number].ratio == ratio]
        made = optimised(
            checkpoint, [asked[number] for number in group], ratio=OWN if ratio is None else ratio, **ALONE
        )
        answers |= dict(zip(group, made, strict=True))
    return answers


def differences(outcome: Outcome, reference: dict[int, Answer]) -> tuple[list[int], float]:
    """(numbers of answers with other ids or other numbers of prompt tokens, the largest difference of log-probabilities
    of the others)."""
    wrong, largest = [], 0.0
    for number, answer in outcome.answers.items():
        known = reference[number]
        if (answer.ids, answer.prompt, len(answer.logprobs)) != (known.ids, known.prompt, len(known.logprobs)):
            wrong.append(number)
            continue
        largest = max(largest, *(abs(a - b) for a, b in zip(answer.logprobs, known.logprobs, strict=True)))
    return wrong, largest


def growth(memory: list[dict[str, float]]) -> dict[str, float]:
    """By process, MiB by which its last tenth is above the tenth behind the middle; all of one that came later."""
    tenth, half = max(1, len(memory) // 10), len(memory) // 2

    def size(name: str, part: list[dict[str, float]]) -> float:
        return statistics.median(each.get(name, 0.0) for each in part)

    names = dict.fromkeys(name for each in memory for name in each)
    return {name: size(name, memory[-tenth:]) - size(name, memory[half : half + tenth]) for name in names}


def overgrown(memory: list[dict[str, float]], requests: int) -> list[str]:
    """The processes that grew by more than they may."""
    return [name for name, more in growth(memory).items() if more > GROWTH] if requests >= ENOUGH else []


def settled(server: Server, seconds: float = 30) -> bool:
    """Whether vLLM counts no request any more that runs or waits."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if not server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
            return True
        time.sleep(0.5)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", choices=LEAK, help="what must make it exit 1")
    given, others = parser.parse_known_args()
    asked = requests(given.requests, given.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        others += LEAK.get(given.control, [])
        options = ("--trust-request-mm-kwargs", "--limit-mm-per-prompt", '{"image": 2}', *others)
        with serving(given.checkpoint, log, *options, ratio=OWN, environment=STEADY) as server:
            outcome = asyncio.run(all_answered(server, asked))
            print(f"{len(asked)} requests in {outcome.seconds:.0f} s, {AT_ONCE} at once")
            print(f"answers {len(outcome.answers)}, clients that left {outcome.left}, other {outcome.other[:3]}")
            print(f"sent again {outcome.again}, cache drifts {log.read_text().count(DRIFT)}")
            print("kinds", dict(Counter(f"{len(each.images)} images" for each in asked)))
            print("settled", settled(server), "health", server.get("/health") == "")
            for name in ("hawk:visual_tokens_total", "hawk:kept_visual_tokens_total", "vllm:prompt_tokens_total"):
                print(name, int(server.metric(name)))
            for name, more in growth(outcome.memory).items():
                sizes = [each.get(name, 0.0) for each in outcome.memory][:: max(1, len(outcome.memory) // 10)]
                print(name, *(f"{size:.0f}" for size in sizes), f"MiB, {more:+.1f} over the last half")
        print("\n".join(line for line in log.read_text().splitlines() if "hawk:" in line))
        print("exit status", server.process.returncode)
    wrong, largest = differences(outcome, expected(given.checkpoint, asked, sorted(outcome.answers)))
    print(f"other ids or prompt tokens than optimize: {wrong}; largest difference of log-probabilities {largest:.1e}")
    too_large = overgrown(outcome.memory, given.requests)
    judged = f"grew by more than {GROWTH:.0f} MiB: {too_large}" if given.requests >= ENOUGH else "not judged"
    print(f"memory over the last half: {judged}")
    sys.exit(bool(wrong or outcome.other or largest > 1e-4 or too_large))


if __name__ == "__main__":
    main()
