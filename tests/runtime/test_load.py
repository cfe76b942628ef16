"""Calls of many kinds side by side, some of which fail, on a model that several threads call first at once.

What ten minutes of it show stands in benchmarks/RESULTS.md; the command is `python -m tests.runtime.load`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile.errors import HawkError, UnsupportedCallError
from tests import zoo
from tests.runtime.load import faults, points
from tests.runtime.load.calls import Answer, Call, answered, calls, conversation, in_tasks, step_by_step, streamed
from tests.runtime.load.faults import FAULTS, interrupted
from tests.runtime.load.leftovers import attributes, held, left_in_thread
from tests.runtime.load.run import CONTROLS, RATIO, Load, Outcome
from tests.runtime.models import LAYERS, generate, picture, pruned


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """asyncio tells of every task that was ended by no Exception."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    yield
    logging.getLogger("asyncio").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def load() -> Load:
    """Of calls that one graph serves."""
    return Load("llava", "eager", 1, of={answered, conversation, streamed, step_by_step, in_tasks})


@pytest.fixture(scope="module")
def whole_load() -> Load:
    return Load("llava", "eager", 2)


def test_for_a_moment(load: Load) -> None:
    """Four threads begin at once; then one call in four fails."""
    outcome = load.run(4, 1.5)
    assert outcome.wrong() == []
    assert outcome.answers.total() >= 4 and outcome.compilations <= 3


@pytest.mark.parametrize("control", ["state", "lock", "answer"])
@pytest.mark.slow
def test_what_is_wrong_is_seen(load: Load, control: str) -> None:
    load.control = control
    try:
        assert load.run(2, 1, least=10).wrong()
    finally:
        load.control = None


def test_memory_that_grows_is_seen() -> None:
    flat = Outcome(seconds=600, memory=[(second, 700.0 + second % 7) for second in range(600)])
    assert flat.wrong() == []
    leak = Outcome(seconds=600, memory=[(second, 700.0 + second / 20) for second in range(600)])
    assert leak.wrong() and CONTROLS[0] == "leak"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("llava", "eager"), ("qwen2_5_vl", "inductor")])
def test_for_half_a_minute(name: str, backend: str) -> None:
    outcome = Load(name, backend, 2).run(8, 25, least=3)
    assert outcome.wrong() == []
    assert outcome.answers.total() >= 24


@pytest.mark.slow
def test_every_fault_alone(whole_load: Load) -> None:
    """One after another, each in the call that it fits; the next call answers right."""
    load = whole_load
    kinds = {each.make: place for place, each in reversed([*enumerate(load.calls)])}
    draw = random.Random(0)
    with points.fallible():
        model = load.optimised()
        for fault in FAULTS:
            for make in (streamed, conversation, step_by_step):
                place = kinds[make]
                fault(model, load.calls[place], draw)
                assert left_in_thread(model) == [] and held(model) == [], fault
                assert load.calls[place](model).distance(load.alone[place]) < 2e-5
    assert load.new_attributes(model) == []


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("point", "error"), [
    ("graph", torch.OutOfMemoryError),
    *(pytest.param(point, error, marks=SLOW) for point, error in (
        ("compiling prefill", KeyboardInterrupt),
        ("graph", KeyboardInterrupt), ("compiling prefill", torch.OutOfMemoryError), ("encoder", SystemExit),
        ("behind prefill", torch.OutOfMemoryError), ("compiling decode step", KeyboardInterrupt),
    )),
])  # fmt: skip
def test_the_first_call_fails(load: Load, point: str, error: type[BaseException]) -> None:
    """In the middle of its compilation, or of the graph that it has just made; as by Ctrl-C, or for want of memory."""
    call, alone = load.calls[0], load.alone[0]
    if "step" in point:
        call = replace(call, make=compiling_steps)
    with points.fallible():
        plain = points.fragile(zoo.build(load.name, layers=2))
        before = attributes(plain)
        model = hawk_compile.optimize(plain, ratio=RATIO, backend="eager")
        points.fuse.error, points.fuse.left, points.fuse.point = error, 0, point
        with pytest.raises(error):
            call(model)
        assert points.fuse.point is None and left_in_thread(model) == [] and held(model) == []
        assert call(model).distance(alone) < 2e-5
        left = attributes(hawk_compile.restore(model))
        more = {each for name in left for each in set(left[name]) - set(before[name])}
        assert not {each for each in more if "captur" not in each}, "transformers marks what records hidden states"


@pytest.mark.slow
def test_interruptions_between_any_two_instructions(whole_load: Load) -> None:
    """In first calls, which compile, and in later ones."""
    draw, came, load = random.Random(0), 0, whole_load
    with points.fallible():
        for number in range(120):
            if number % 12 == 0:
                model = load.optimised()
            place = draw.randrange(len(load.calls))
            came += interrupted(model, load.calls[place], draw) == "came"
            assert left_in_thread(model) == [] and held(model) == [], number
            assert load.calls[place](model).distance(load.alone[place]) < 2e-5, number
    assert came > 40


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_cache_that_was_filled_in_part_is_refused(name: str) -> None:
    """Some of its layers hold tokens that others do not: what is said behind it would be wrong."""
    inputs = picture(name)
    alone = generate(pruned(name), inputs, 2)
    for layer in range(LAYERS):
        cache = faults.Full(pruned(name), layer)
        with pytest.raises(torch.OutOfMemoryError):
            generate(pruned(name), inputs, 2, past_key_values=cache)
        cache.layer = None
        if layer:
            with pytest.raises(UnsupportedCallError, match="left filled in part by a call that failed"):
                pruned(name)(**inputs, past_key_values=cache)
            with pytest.raises(UnsupportedCallError, match="left filled in part by a call that failed"):
                generate(pruned(name), inputs, 2, past_key_values=cache)
            cache.reset()
        again = generate(pruned(name), inputs, 2, past_key_values=cache)
        assert torch.equal(again.sequences, alone.sequences) and torch.equal(again.logits[1], alone.logits[1])


def test_a_step_that_fails_between_two_layers() -> None:
    """As for want of memory: the next call on that cache would attend to a token in some layers alone."""
    model = points.fragile(zoo.build("llava", layers=2))
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    out = model(**zoo.text_only("llava", model), use_cache=True)
    step = {"input_ids": torch.tensor([[70]]), "past_key_values": out.past_key_values}
    points.fuse.error, points.fuse.left, points.fuse.point = torch.OutOfMemoryError, 0, "layer"
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        model(**step)
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="start the conversation anew"):
        model(**step)


def test_a_prefill_that_fails_leaves_the_conversation_as_it_was() -> None:
    """A second turn with images whose graph fails, and the same again."""
    model, inputs = pruned("llava"), picture("llava")
    before = generate(model, inputs, 2).past_key_values
    lengths = [layer.keys.shape for layer in before.layers]
    run = model._hawk_runtime.prefill.run

    def fail(*args: Any) -> Any:
        run(*args)
        raise torch.OutOfMemoryError

    with torch.no_grad():
        model._hawk_runtime.prefill.run = fail
        try:
            with pytest.raises(torch.OutOfMemoryError):
                model(**without_mask(inputs), past_key_values=before)
        finally:
            del model._hawk_runtime.prefill.run
        assert [layer.keys.shape for layer in before.layers] == lengths
        again = model(**without_mask(inputs), past_key_values=before)
        fresh = generate(model, inputs, 2).past_key_values
        torch.testing.assert_close(again.logits, model(**without_mask(inputs), past_key_values=fresh).logits)


def without_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def compiling_steps(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    runtime = model._hawk_runtime
    with runtime.asking(replace(runtime.settings, compile_decode=True)):
        return answered(model, inputs, **options)


@pytest.mark.slow
def test_settings_change_while_others_generate() -> None:
    """By one thread: what the others get is right by the one or by the other, whole, or it is refused."""
    seconds = 15.0
    model = zoo.build("llava", layers=2)
    prompts = [call for call in calls("llava", model, 2) if call.make in (answered, conversation)]
    plain = [call(model) for call in prompts]
    pruned = {}
    for ratio in (0.3, 0.6):
        hawk_compile.optimize(model, ratio=ratio, backend="eager")
        pruned[ratio] = [call(model) for call in prompts]
    stop, wrong = threading.Event(), list[str]()

    def ask(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            place = draw.randrange(len(prompts))
            try:
                said = prompts[place](model)
            except HawkError:
                continue
            except BaseException as error:
                wrong.append(f"{prompts[place].kind}: {type(error).__name__}: {error}")
                continue
            answers = [first_turn(prompts[place], each[place]) for each in (plain, *pruned.values())]
            if min(first_turn(prompts[place], said).distance(each) for each in answers) > 2e-5:
                wrong.append(f"{prompts[place].kind} says what no settings make it say")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    changes: tuple[Callable[[], Any], ...] = (
        lambda: hawk_compile.optimize(model, ratio=0.3, backend="eager"), lambda: hawk_compile.restore(model),
        lambda: hawk_compile.optimize(model, ratio=0.6, backend="eager"), lambda: in_a_block(model, prompts[0]),
    )  # fmt: skip
    try:
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        while not stop.is_set():
            for change in changes:
                change()
                stop.wait(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    hawk_compile.restore(model)
    assert [call(model).distance(alone) for call, alone in zip(prompts, plain, strict=True)] == [0.0] * len(plain)


def first_turn(call: Call, answer: Answer) -> Answer:
    """Of a conversation, what was said before the settings may have changed; of other calls, all."""
    if call.make is not conversation:
        return answer
    return Answer(answer.ids[:1], answer.steps[: len(answer.ids[0]) - call.inputs["input_ids"].shape[1]])


def in_a_block(model: Any, call: Any) -> None:
    with hawk_compile.pruned(model, ratio=0.3, backend="eager"), suppress(HawkError):
        call(model)
