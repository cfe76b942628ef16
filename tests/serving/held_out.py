"""The engine on held-out questions of the demo, as it comes with the package, beside `optimize`: ids, log-probabilities
and what is kept.

    python -m tests.serving.held_out [--questions 200] [--ratio 0.6 --ratio 0.8 --ratio 0.9] [--chunks] [--prefix-cache]
        [--compiled] [--ranks 2] [--control positions]

Prints a row for every ratio and round of questions. Exits 1 if anything differs, log-probabilities by more than 1e-4,
as with a control it must. What is kept is what the engine's model chose, in this process; with ranks the model is in
others, and kept sets are not compared.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hawk_compile.tools.demo.run import MODEL
from tests.serving.cases import Asked
from tests.serving.engine import ALONE, Answer, engine, farthest, metric, optimised, prompts, served

CLOSE = 1e-4
"""Log-probabilities in fp32, of two implementations of the same model."""
BLOCK = CHUNK = 32
"""Tokens of a block of the key-value cache, and of a step of the prefill."""
CONTROLS = ("positions", "question")


@dataclass
class Item:
    """A picture with its question, as it came to be scored, and what was kept each time."""

    question: Tensor
    features: Tensor
    kept: list[list[int]]

    def same(self, question: Tensor, features: Tensor) -> bool:
        """Features of another batch may differ in their last digits."""
        alike = torch.equal(self.question, question) and self.features.shape == features.shape
        return alike and torch.allclose(self.features, features, atol=1e-3)


@dataclass
class Choices:
    """What the model of an engine in this process chose, by item, in the order in which they first came."""

    items: list[Item] = field(default_factory=list)

    def note(self, question: Tensor, features: Tensor, chosen: Tensor) -> None:
        for item in self.items:
            if item.same(question, features):
                item.kept.append(chosen.tolist())
                return
        self.items.append(Item(question.clone(), features.clone(), [chosen.tolist()]))

    def same(self, expected: list[Answer]) -> int:
        """How many prompts kept what `optimize` keeps, each time. Requests are scored in the order of their prompts;
        if there are not as many items as prompts, none is known to be of a prompt."""
        if len(self.items) != len(expected):
            return 0
        pairs = zip(self.items, expected, strict=True)
        return sum(all(kept == known.kept for kept in item.kept) for item, known in pairs)


@contextmanager
def noted() -> Iterator[Choices]:
    from hawk_compile.serving.vllm import model

    choose, choices = model.kept, Choices()

    def choosing(config: Any, projections: Any, weights: Tensor, words: Tensor, features: Tensor, *rest: Any) -> Tensor:
        chosen = choose(config, projections, weights, words, features, *rest)
        choices.note(words, features, chosen)
        return chosen

    with mock.patch.object(model, "kept", choosing):
        yield choices


@dataclass(frozen=True)
class Row:
    """How many of the answers to `asked` prompts are those of `optimize`.

    Attributes:
        kept: how many of the kept sets; None: not compared.
        largest: difference of log-probabilities, in answers with the same ids.
        prompt: tokens of all prompts that the decoder read.
        cached: tokens of them that the prefix cache had.
    """

    ratio: float
    round: int
    asked: int
    ids: int
    prompts: int
    kept: int | None
    largest: float
    prompt: int
    cached: int

    @property
    def same(self) -> bool:
        return {self.ids, self.prompts, self.kept} - {None} == {self.asked} and self.largest <= CLOSE

    def __str__(self) -> str:
        kept = "not compared" if self.kept is None else f"{self.kept} of {self.asked}"
        return (
            f"removed {self.ratio}, round {self.round}: same ids {self.ids} of {self.asked}, same numbers of prompt "
            f"tokens {self.prompts} of {self.asked}, same kept sets {kept}, largest difference of log-probabilities "
            f"{self.largest:.1e}; {self.prompt:,} prompt tokens, {self.cached:,} of them from the cache"
        )


def compared(
    llm: Any, asked: Sequence[Asked], ratio: float, rounds: int = 1, here: bool = True, **settings: Any
) -> list[Row]:
    """Rounds of the same questions to an engine on the demo whose caches are empty.

    Args:
        here: whether the engine's model is in this process.
        settings: of `optimize`, others than those of a server.
    """
    expected = optimised(MODEL, asked, ratio=ratio, **{**ALONE, **settings})
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    rows = []
    with noted() as choices:
        for number in range(rounds):
            before = metric(llm, "vllm:prefix_cache_hits")
            answers = served(llm, MODEL, asked, ratio)
            pairs = list(zip(answers, expected, strict=True))
            rows.append(Row(
                ratio, number + 1, len(asked),
                ids=sum(one.ids == other.ids for one, other in pairs),
                prompts=sum(one.prompt == other.prompt for one, other in pairs),
                kept=choices.same(expected) if here else None,
                largest=max((farthest([one], [other]) for one, other in pairs if one.ids == other.ids), default=0.0),
                prompt=sum(answer.prompt for answer in answers),
                cached=int(metric(llm, "vllm:prefix_cache_hits") - before),
            ))  # fmt: skip
    return rows


@contextmanager
def broken(control: str) -> Iterator[None]:
    """The plugin without a part of it: positions that are not restored, or a question that is no part of an item's
    identity."""
    from hawk_compile.serving.vllm import positions, processor

    restored = positions.restored

    def left(rows: Any, ids: Any, known: Any, *rest: Any) -> Any:
        rows, _, delta = restored(rows, ids, known, *rest)
        return rows, known, delta

    if control == "positions":
        with mock.patch.object(positions, "restored", left):
            yield
    else:
        with mock.patch.object(processor, "mixed", lambda item_hash, settings, question: item_hash + settings):
            yield


def options(given: argparse.Namespace) -> dict[str, Any]:
    """vLLM's, for what was asked on the command line."""
    made: dict[str, Any] = {"disable_log_stats": False, "enforce_eager": not given.compiled, "block_size": BLOCK}
    if given.chunks:
        made["max_num_batched_tokens"] = CHUNK
    if given.prefix_cache:
        made["enable_prefix_caching"] = True
    if given.ranks > 1:
        made |= {"tensor_parallel_size": given.ranks, "distributed_executor_backend": "mp"}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--ratio", type=float, action="append", help="0.6, 0.8 and 0.9 if none is given")
    parser.add_argument("--chunks", action="store_true", help=f"prefill in chunks of {CHUNK} tokens")
    parser.add_argument("--prefix-cache", action="store_true", help="two rounds, with prefix caching")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel")
    parser.add_argument("--control", choices=CONTROLS, help="what must fail: a part of the plugin is left out")
    given = parser.parse_args()
    if given.ranks > 1:
        cores = sorted(os.sched_getaffinity(0))[: given.ranks]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
    asked, rounds, right = prompts(given.questions), 1 + given.prefix_cache, True
    with broken(given.control) if given.control else nullcontext():
        llm = engine(MODEL, {"ratio": 0.8}, **options(given))
        for ratio in given.ratio or (0.6, 0.8, 0.9):
            for row in compared(llm, asked, ratio, rounds, here=given.ranks == 1):
                print(row, flush=True)
                right &= row.same
    sys.exit(not right)


if __name__ == "__main__":
    main()
