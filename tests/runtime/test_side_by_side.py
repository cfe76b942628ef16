"""No lock is held while a compiled prefill or decode step runs: shown by meetings inside the graphs, not by a clock."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends import registry
from transformers import DynamicCache, masking_utils

import hawk_compile
from hawk_compile.capture import turns
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.runtime import compiled
from tests.marks import slow
from tests.runtime.models import fresh, generate, picture, pruned

SECONDS = 120
"""For a meeting that takes place; one that does not breaks."""


class Graphs:
    """What happens inside every compiled graph before it runs."""

    def __init__(self) -> None:
        self.inside: Callable[[], Any] = lambda: None

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.inside()
            return function(*args)

        return run

    @contextlib.contextmanager
    def meeting(self, threads: int) -> Iterator[None]:
        """Every graph waits until all threads are inside one."""
        self.inside = threading.Barrier(threads, timeout=SECONDS).wait
        try:
            yield
        finally:
            self.inside = lambda: None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made, real, step = Graphs(), compiled.compile_graph, registry.lookup_backend("eager")
    monkeypatch.setattr(compiled, "compile_graph", lambda *args, **options: made.around(real(*args, **options)))
    monkeypatch.setitem(registry._COMPILER_FNS, "eager", lambda gm, inputs, **_: made.around(step(gm, inputs)))
    return made


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each gives in a thread of its own; an error is raised again here."""
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[index] for index in range(len(work))]


class AnnouncedLock:
    """The lock of captures, which tells that a thread has asked for it."""

    def __init__(self, asked: threading.Event) -> None:
        self.lock, self.asked = threading.RLock(), asked

    def acquire(self) -> None:
        self.asked.set()
        self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


@torch.no_grad()
def prefill(model: Any, which: int, name: str = "llava") -> tuple[torch.Tensor, list[int]]:
    """Logits and kept positions, reported by output."""
    out = model(**picture(name, which))
    return out.logits, hawk_compile.report(out).keep_indices[0].tolist()


def check(results: list[Any], expected: list[Any]) -> None:
    for (logits, kept), (logits_alone, kept_alone) in zip(results, expected, strict=True):
        assert kept == kept_alone and torch.equal(logits, logits_alone)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("name", ["llava", *slow("qwen2_5_vl")])
def test_prefills_overlap(graphs: Graphs, models: int, name: str) -> None:
    used = [fresh(name) for _ in range(models)]
    pairs = [(used[0], 2), (used[-1], 4)]
    expected = [prefill(model, which, name) for model, which in pairs]
    with graphs.meeting(2):
        results = together(*(lambda pair=pair: prefill(*pair, name) for pair in pairs))
    check(results, expected)


@pytest.mark.parametrize("models", [1, *slow(2)])
def test_first_calls_overlap(graphs: Graphs, models: int) -> None:
    """A graph runs without the lock in the call that captured it, too."""
    used = [fresh("llava") for _ in range(models)]
    with graphs.meeting(2):
        results = together(lambda: prefill(used[0], 2), lambda: prefill(used[-1], 4))
    check(results, [prefill(used[0], 2), prefill(used[-1], 4)])


def test_an_eager_call_beside_a_capture_is_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in while a graph is captured must not stand in for another thread's call: the check of features
    against placeholders holds there, and encoded audio is not taken for encoded already."""
    model = fresh("llava")
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # what another thread's capture sets
    inputs = picture("llava", 2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises((ValueError, RuntimeError)):  # which of them, transformers decides by the same flag
        model.model.get_placeholder_mask(inputs["input_ids"], embeds, image_features=embeds[0, :1])


@pytest.mark.parametrize("models", [1, *slow(2)])
def test_decode_steps_overlap(graphs: Graphs, models: int) -> None:
    used = [fresh("llava", compile_decode=True) for _ in range(models)]
    pairs = [(used[0], 2), (used[-1], 4)]
    for model, which in pairs:
        generate(model, picture("llava", which), 3)

    def step(cache: DynamicCache, model: Any, which: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([[70]]), past_key_values=cache).logits

    caches = [generate(model, picture("llava", which), 2).past_key_values for model, which in pairs]
    expected = [
        step(generate(model, picture("llava", which), 2).past_key_values, model, which) for model, which in pairs
    ]
    with graphs.meeting(2):
        results = together(*(
            lambda cache=cache, pair=pair: step(cache, *pair) for cache, pair in zip(caches, pairs, strict=True)
        ))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_prefill_runs_while_another_model_is_captured(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    known, new = fresh("llava"), fresh("llava")
    expected = [prefill(known, 2), prefill(pruned("llava"), 4)]
    capturing, done = threading.Event(), threading.Event()
    real = compiled.compile_graph

    def slow(*args: Any, **options: Any) -> Any:
        capturing.set()
        assert done.wait(SECONDS)
        return real(*args, **options)

    monkeypatch.setattr(compiled, "compile_graph", slow)

    def meanwhile() -> Any:
        assert capturing.wait(SECONDS)
        try:
            return prefill(known, 2)
        finally:
            done.set()

    check(together(meanwhile, lambda: prefill(new, 4)), expected)


@contextlib.contextmanager
def changed_code() -> Iterator[None]:
    """As an export changes transformers: the same work by another function."""
    with pytest.MonkeyPatch.context() as patch:
        original = masking_utils.sdpa_mask
        patch.setitem(
            masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa",
            lambda *args, **kwargs: original(*args, **kwargs),
        )  # fmt: skip
        yield


def reset(model: Any) -> None:
    torch._dynamo.reset()


def adapted(model: Any) -> None:
    """A layer replaced by another of the same shape, as adapters do."""
    head = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Sequential(head))


@pytest.mark.parametrize(("change", "compilations"), [
    pytest.param(reset, 1, marks=pytest.mark.slow, id="reset"), pytest.param(adapted, 1, id="adapter"),
    pytest.param(lambda model: None, 0, marks=pytest.mark.slow, id="code"),
])  # fmt: skip
def test_a_known_call_that_is_compiled_anew_waits_for_an_export(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], compilations: int
) -> None:
    """A call of a structure that ran before, which Dynamo's guards send to be compiled while an export has changed
    transformers' code: it waits until the code is as it was, and is then compiled if that is still needed."""
    model = fresh("llava")
    prefill(model, 2)
    asked, exporting = threading.Event(), threading.Event()
    monkeypatch.setattr(turns, "capture_lock", AnnouncedLock(asked))
    real, during = compiled.compile_graph, []

    def compile_graph(*args: Any, **options: Any) -> Any:
        during.append(exporting.is_set())
        asked.set()  # too late to wait
        return real(*args, **options)

    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    change(model)

    def export() -> None:
        turns.capture_lock.lock.acquire()
        with changed_code():
            exporting.set()
            assert asked.wait(SECONDS)
        exporting.clear()
        turns.capture_lock.release()

    def call() -> Any:
        assert exporting.wait(SECONDS)
        return prefill(model, 2)

    _, result = together(export, call)
    assert during == [False] * compilations
    check([result], [prefill(model, 2)])


def test_what_is_compiled_already_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("llava", compile_decode=True)
    expected = prefill(model, 2)
    tokens = generate(model, picture("llava", 2), 3).sequences

    def refuse() -> Any:
        raise AssertionError("a turn was taken")

    monkeypatch.setattr(turns, "capture_settings", refuse)
    check([prefill(model, 2)], [expected])
    assert torch.equal(generate(model, picture("llava", 2), 3).sequences, tokens)


def test_a_race_for_the_first_call() -> None:
    """Eight threads, one model that has captured nothing: one compilation, and each gets what it gets alone."""
    which = [2, 4, 5, 0, 1, 3, 2, 4]
    expected = [prefill(pruned("llava"), each) for each in which]
    model, start = fresh("llava"), threading.Barrier(len(which))

    def work(each: int) -> Any:
        start.wait()
        return prefill(model, each)

    check(together(*(lambda each=each: work(each) for each in which)), expected)
    assert model._hawk_runtime.compilations == 1


def test_an_error_in_one_thread_is_its_own(graphs: Graphs) -> None:
    """Wrong inputs, a call that is refused and a failure inside the graph, beside prefills that go well."""
    model = fresh("llava")
    expected = [prefill(model, which) for which in (2, 4)]
    failing = threading.local()

    def fail() -> None:
        if getattr(failing, "now", False):
            raise ZeroDivisionError

    def wrong(error: type[Exception], in_graph: bool = False, **more: Any) -> Any:
        failing.now = in_graph
        for _ in range(4):
            with pytest.raises(error):
                model(**picture("llava", 4) | more)
        failing.now = False
        return prefill(model, 4)

    graphs.inside = fail
    ids = picture("llava", 4)["input_ids"]
    results = together(
        lambda: [prefill(model, 2) for _ in range(4)][-1],
        lambda: wrong(UnsupportedCallError, labels=ids),
        lambda: wrong(InputError, attention_mask=torch.ones(1, 3).long()),
        lambda: wrong(ZeroDivisionError, in_graph=True),
    )
    check(results, [expected[0], expected[1], expected[1], expected[1]])


@torch.no_grad()
def test_images_encoded_while_a_third_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks of the whole process whether it is captured: hidden states then went to one place for all."""
    model = fresh("llava")
    inputs = [{"pixel_values": picture("llava", which)["pixel_values"]} for which in (0, 1)]
    alone = [model.base_model.get_image_features(**given).pooler_output for given in inputs]
    monkeypatch.setattr("torch.compiler._is_compiling_flag", True)
    meeting = threading.Barrier(2, timeout=SECONDS)
    layer = next(module for name, module in model.base_model.vision_tower.named_modules() if name.endswith("layers.0"))

    def meet(*_: Any) -> None:
        meeting.wait()

    hook = layer.register_forward_pre_hook(meet)

    def encode(which: int) -> Any:
        with torch.no_grad():
            return model.base_model.get_image_features(**inputs[which]).pooler_output

    try:
        found = together(lambda: encode(0), lambda: encode(1))
    finally:
        hook.remove()
    for here, there in zip(alone, found, strict=True):
        assert torch.equal(torch.cat([*here]), torch.cat([*there]))
