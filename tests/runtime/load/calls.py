"""The calls that are made side by side, each of which says the same whenever it is made, alone or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from tests import zoo
from tests.zoo import Row

TOKENS = 5
QUESTION = [60, 61, 62, 63]
OWN_RATIO = 0.3
"""Of calls with settings of their own."""
ROUNDING = 2e-5
"""Of log-probabilities in fp32. Most answers are those of the call alone bit for bit. Not those on a static cache,
which is as long as an earlier call has needed, nor all of batches, whose graph was captured for the batch that came
first: the same sums in another order."""


@dataclass(frozen=True)
class Answer:
    """What a call said: its ids, and the log-probabilities of every step."""

    ids: list[list[int]]
    steps: list[Tensor]

    def distance(self, other: Answer) -> float:
        """The largest difference of log-probabilities; infinity where the ids or the steps are not the same."""
        if self.ids != other.ids or [step.shape for step in self.steps] != [step.shape for step in other.steps]:
            return float("inf")
        pairs = zip(self.steps, other.steps, strict=True)
        return max((float((a - b).abs().max()) if not torch.equal(a, b) else 0.0 for a, b in pairs), default=0.0)


@dataclass(frozen=True)
class Call:
    """A kind of call, the prompt of `inputs`, and what makes it: (model, inputs, more arguments of generate)."""

    kind: str
    inputs: dict[str, Tensor]
    make: Callable[..., Answer]

    def __call__(self, model: Any, **options: Any) -> Answer:
        return self.make(model, self.inputs, **options)


class Collected(BaseStreamer):
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def said(*outputs: Any) -> Answer:
    ids = [row for out in outputs for row in out.sequences.tolist()]
    return Answer(ids, [step.log_softmax(-1) for out in outputs for step in out.logits])


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": TOKENS, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def answered(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    return said(generated(model, inputs, **options))


def with_beams(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    return answered(model, inputs, **{"num_beams": 3, "num_return_sequences": 2} | options)


def on_static_cache(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    if options.get("num_beams", 1) > 1:
        return answered(model, inputs, **options)
    return answered(model, inputs, **{"cache_implementation": "static"} | options)


def on_own_static_cache(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    return answered(model, inputs, **{"past_key_values": cache} | options)


def without_cache(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    return answered(model, inputs, **{"use_cache": False} | options)


def in_chunks(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    return answered(model, inputs, **{"prefill_chunk_size": 4} | options)


def with_lookup(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    """What stands in the prompt is drafted; criteria and streamers are told of several tokens at once."""
    return answered(model, inputs, **{"prompt_lookup_num_tokens": 3} | options)


def asked_by_ids(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    """The question is one token of the text."""
    token = int(inputs["input_ids"][0, -4])
    return answered(model, inputs, question_ids=[[token]], **options)


def by_own_settings(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    """As a runner's call with a ratio of its own; its decode steps are compiled."""
    runtime = model._hawk_runtime
    with runtime.asking(replace(runtime.settings, ratio=OWN_RATIO, compile_decode=True)):
        return answered(model, inputs, **options)


def streamed(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    streamer = options.pop("streamer", None) or Collected()
    out = generated(model, inputs, streamer=streamer, **options)
    if isinstance(streamer, Collected):
        assert streamer.ids == out.sequences[0].tolist(), "the streamer was told something else than was returned"
    return said(out)


def conversation(model: Any, inputs: dict[str, Tensor], **options: Any) -> Answer:
    """Two turns on one cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    first = generated(model, inputs, past_key_values=cache, **options)
    ids = torch.cat([first.sequences, torch.tensor([QUESTION])], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = {name: inputs[name] for name in ("mm_token_type_ids", "token_type_ids") if name in inputs}
    longer |= {name: torch.nn.functional.pad(value, (0, more)) for name, value in kinds.items()}
    return said(first, generated(model, longer, past_key_values=cache, **options))


def steps(model: Any, inputs: dict[str, Tensor], count: int = TOKENS) -> Iterator[tuple[int, Tensor]]:
    """(token, log-probabilities), forward by forward, as an engine of one's own would decode."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    for number in range(count):
        chosen = out.logits[0, -1].log_softmax(-1)
        token = int(chosen.argmax())
        yield token, chosen
        if number + 1 < count:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)


def step_by_step(model: Any, inputs: dict[str, Tensor], **_: Any) -> Answer:
    told = [*steps(model, inputs)]
    return Answer([[token for token, _ in told]], [chosen for _, chosen in told])


def in_tasks(model: Any, inputs: dict[str, Tensor], **_: Any) -> Answer:
    """Three conversations in asynchronous tasks of one thread, which take turns at every token."""

    async def one() -> Answer:
        ids, chosen = [], []
        for token, each in steps(model, inputs):
            ids.append(token)
            chosen.append(each)
            await asyncio.sleep(0)
        return Answer([ids], chosen)

    async def three() -> list[Answer]:
        return await asyncio.gather(*(one() for _ in range(3)))

    answers = asyncio.run(three())
    return Answer([row for each in answers for row in each.ids], [step for each in answers for step in each.steps])


ONE_ROW = (
    answered, with_beams, on_static_cache, on_own_static_cache, without_cache, in_chunks, with_lookup, asked_by_ids,
    by_own_settings, streamed, conversation, step_by_step, in_tasks,
)  # fmt: skip
"""What is done with prompts of one row."""
ROWS = (answered, with_beams, on_static_cache, by_own_settings)


def calls(name: str, model: Any, prompts: int) -> list[Call]:
    """Every kind of call on prompts of some sizes: images of several sizes, several images, text alone, batches.

    Args:
        prompts: how many with images, beside text and batches.
    """
    sizes = zoo.sizes(name)
    made: list[Call] = []

    def add(kind: str, kinds: tuple[Callable[..., Answer], ...], *rows: Row) -> None:
        inputs = zoo.inputs(name, model, rows=rows, seed=len(made))
        made.extend(Call(f"{kind}, {each.__name__.replace('_', ' ')}", inputs, each) for each in kinds)

    for row in sizes[:prompts]:
        add(f"{len(row.images)} image{'s' * (len(row.images) > 1)}", ONE_ROW, row)
    add("text", tuple(each for each in ONE_ROW if each is not asked_by_ids), Row(before=0, after=6))
    add("2 rows", ROWS, sizes[0], sizes[min(2, prompts)])
    add("3 rows, one of text", ROWS, sizes[1], Row(before=0, after=5), sizes[0])
    return made
