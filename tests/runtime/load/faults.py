"""Ways in which a call fails or is broken off, each at a place that is drawn."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from hawk_compile.errors import HawkError
from tests.runtime.load.calls import (
    ROUNDING,
    TOKENS,
    Answer,
    Call,
    Collected,
    conversation,
    generated,
    in_tasks,
    step_by_step,
    steps,
    with_lookup,
)
from tests.runtime.load.points import fuse, told_at

SECONDS = 20.0
"""After which an interruption that was lost is given up."""
OWN = "in the caller's own code"
"""What a criterion, processor or streamer says that fails."""


class Broken(BaseException):
    """As KeyboardInterrupt: no Exception, and nobody's business but the caller's."""


ERRORS: tuple[type[BaseException], ...] = (
    torch.OutOfMemoryError, RuntimeError, ZeroDivisionError, KeyboardInterrupt, SystemExit, Broken,
)  # fmt: skip


class Failing(LogitsProcessor):
    """A logits processor that fails after some steps."""

    def __init__(self, left: int, error: type[BaseException]) -> None:
        self.left, self.error = left, error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise self.error(OWN)
        return scores


class Stopping(StoppingCriteria):
    """The caller wants no more after some steps, or fails there."""

    def __init__(self, left: int, error: type[BaseException] | None = None) -> None:
        self.left, self.error = left, error

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error(OWN)
        return torch.full((input_ids.shape[0],), self.left < 0)


class Deaf(Collected):
    """A streamer that fails after some tokens."""

    def __init__(self, left: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = left, error

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error(OWN)


class Full(DynamicCache):
    """A cache that has no memory for one of its layers."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__(config=model.config.get_text_config())
        self.layer: int | None = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == self.layer:
            raise torch.OutOfMemoryError("in the cache")
        return super().update(keys, values, layer_idx, *args, **kwargs)


Fault = Callable[[Any, Call, random.Random], str]
"""(model, call, draw) -> what came of it: "came" where the fault did, "passed" where the call was over before."""


def at(point: str) -> Fault:
    def fault(model: Any, call: Call, draw: random.Random) -> str:
        fuse.error = wanted = draw.choice(ERRORS)
        fuse.left = draw.randrange(3 if point == "graph" else 2 * TOKENS if "layer" in point or "step" in point else 1)
        fuse.point = point
        try:
            call(model)
        except BaseException as error:
            fuse.point = None
            return seen(error, wanted, told_at(point))
        fuse.point = None
        return "passed"

    fault.__name__ = point.replace(" ", "_")
    return fault


def seen(error: BaseException, wanted: type[BaseException], text: str) -> str:
    """That an error is the one that was thrown, by its class and its text, and no other that hides it.

    Raises:
        BaseException: it is another.
    """
    if any(isinstance(each, wanted) and str(each) == text for each in (error, error.__cause__)):
        return "came"
    raise error


def failing_criteria(model: Any, call: Call, draw: random.Random) -> str:
    error = draw.choice(ERRORS)
    return by_options(model, call, error, stopping_criteria=[Stopping(draw.randrange(TOKENS), error)])


def failing_processor(model: Any, call: Call, draw: random.Random) -> str:
    error = draw.choice(ERRORS)
    return by_options(model, call, error, logits_processor=[Failing(draw.randrange(TOKENS), error)])


def failing_streamer(model: Any, call: Call, draw: random.Random) -> str:
    error = draw.choice(ERRORS)
    if call.inputs["input_ids"].shape[0] > 1 or "beams" in call.kind:
        return "passed"
    return by_options(model, call, error, streamer=Deaf(draw.randrange(TOKENS), error))


def by_options(model: Any, call: Call, wanted: type[BaseException], **options: Any) -> str:
    if call.make in (step_by_step, in_tasks):
        return "passed"
    try:
        call(model, **options)
    except BaseException as error:
        return seen(error, wanted, OWN)
    return "passed"


def stopped(model: Any, call: Call, draw: random.Random) -> str:
    """What was said until then is what would have been."""
    if call.make in (step_by_step, in_tasks, conversation, with_lookup):
        return "passed"
    whole = call(model)
    short = call(model, stopping_criteria=[Stopping(draw.randrange(TOKENS))])
    if "beams" not in call.kind:
        ids = [a[: len(b)] for a, b in zip(whole.ids, short.ids, strict=True)]
        begun = Answer(ids, whole.steps[: len(short.steps)])
        assert begun.distance(short) <= ROUNDING, f"stopped, {call.kind} says {short.ids} and not {ids}"
    return "came"


def closed_generator(model: Any, call: Call, draw: random.Random) -> str:
    if call.inputs["input_ids"].shape[0] > 1:
        return "passed"
    running = steps(model, call.inputs)
    for _ in range(draw.randrange(TOKENS)):
        next(running)
    running.close()
    return "came"


def cancelled_task(model: Any, call: Call, draw: random.Random) -> str:
    """A task is cancelled among others, once while it waits and once while a thread generates for it."""
    if call.inputs["input_ids"].shape[0] > 1:
        return "passed"

    async def talk() -> None:
        for _ in steps(model, call.inputs):
            await asyncio.sleep(0)

    async def both() -> None:
        doomed = [asyncio.create_task(talk()), asyncio.create_task(asyncio.to_thread(call, model))]
        await asyncio.sleep(draw.uniform(0, 0.05))
        for task in doomed:
            task.cancel()
        await asyncio.gather(talk(), *doomed, return_exceptions=True)

    asyncio.run(both())
    return "came"


def dying_thread(model: Any, call: Call, draw: random.Random) -> str:
    """A thread ends in the middle of a call, as one does whose streamer is gone."""

    def work() -> None:
        with contextlib.suppress(SystemExit):
            by_options(model, call, SystemExit, stopping_criteria=[Stopping(draw.randrange(TOKENS), SystemExit)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return "came"


def interrupted(model: Any, call: Call, draw: random.Random) -> str:
    """An exception from outside, as that of Ctrl-C, between any two of the call's instructions."""
    target, after = threading.get_ident(), draw.uniform(0, 0.08)

    def throw() -> None:
        time.sleep(after)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(target), ctypes.py_object(Broken))

    thrower = threading.Thread(target=throw)
    came = "lost"
    try:
        thrower.start()
        call(model)
        came = "passed"
        stop = time.monotonic() + SECONDS
        while time.monotonic() < stop:
            time.sleep(0.001)
        came = "lost"
    except Broken:
        came = "came" if came == "lost" else "passed"
    except BaseException as error:
        if not any(isinstance(each, Broken) for each in (error.__cause__, error.__context__)):
            raise
        came = "came"
    thrower.join()
    return came


def full_cache(model: Any, call: Call, draw: random.Random) -> str:
    """No memory while the prompt is handed to the caller's cache, of which a part is filled then: it is refused."""
    if call.inputs["input_ids"].shape[0] > 1:
        return "passed"
    cache = Full(model, draw.randrange(model.config.get_text_config().num_hidden_layers))
    first = cache.layer
    with contextlib.suppress(torch.OutOfMemoryError):
        generated(model, call.inputs, past_key_values=cache)
        raise AssertionError("the cache took the layer")
    cache.layer = None
    try:
        again = generated(model, call.inputs, past_key_values=cache)
    except HawkError:
        return "came"
    alone = generated(model, call.inputs)
    assert torch.equal(again.sequences, alone.sequences), f"half filled (layer {first}), a cache was gone on with"
    return "came"


def wrong_arguments(inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Each makes a call with images one that contradicts itself."""
    ids, rows = inputs["input_ids"], len(inputs["input_ids"])
    short = {name: value[:, :-6] for name, value in inputs.items() if value.shape == ids.shape}
    return [
        {"attention_mask": torch.ones(1, 3).long()}, {"attention_mask": torch.ones(rows, 3).long()},
        {"question_ids": [[0]] * rows, "question_mask": torch.ones(1, 1)}, {"past_key_values": "none"},
        {"question_mask": torch.ones(1, 1)}, *({name: value} for name, value in short.items()),
    ]  # fmt: skip


def refused(model: Any, call: Call, draw: random.Random) -> str:
    """A call that is wrong: said by an error of ours, unless it is a call that the plain model takes too."""
    wrong = draw.choice(wrong_arguments(call.inputs))
    try:
        with torch.no_grad():
            model(**call.inputs | wrong)
    except HawkError:
        return "came"
    return "passed"


FAULTS: tuple[Fault, ...] = (
    *(at(point) for point in (
        "encoder", "layer", "before prefill", "graph", "behind prefill", "before decode step", "behind decode step",
    )),
    failing_criteria, failing_processor, failing_streamer, stopped, closed_generator, cancelled_task, dying_thread,
    interrupted, full_cache, refused,
)  # fmt: skip
