"""The threads of `tests.runtime.load`, and what became of their calls."""

from __future__ import annotations

import gc
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import hawk_compile
from hawk_compile.runtime.generation import Generation, under_way
from hawk_compile.tools.benchmarking.memory import resident
from tests import zoo
from tests.runtime.load import points
from tests.runtime.load.calls import ROUNDING, Answer, Call, calls
from tests.runtime.load.faults import FAULTS, Fault
from tests.runtime.load.leftovers import attributes, held, held_here, left_in_thread
from tests.serving.load import growth

RATIO = 0.6
SHARE = 0.25
"""Of calls that are made to fail."""
GROWTH = 8.0
"""MiB by which the process may grow over the last half of a run of `ENOUGH` seconds or more; before, caches of bounded
size fill (those of oneDNN and of Dynamo's guards), and not all kinds of calls have come."""
ENOUGH = 300.0
CONTROLS = ("leak", "lock", "state", "answer")


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        answers: how many, by kind of call. faults: how many came, or were too late, by kind.
        equal: how many of them bit for bit. largest: the largest difference of log-probabilities of the others.
        errors: what was wrong, in words.
        memory: (seconds, MiB) of the process's own: the system may take back pages of files as it likes.
    """

    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    equal: int = 0
    largest: float = 0.0
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    compilations: int = 0

    @property
    def more(self) -> float:
        """MiB by which the last tenth is above the tenth behind the middle."""
        return growth([{"": size} for _, size in self.memory])[""] if self.memory else 0.0

    def wrong(self) -> list[str]:
        grown = self.seconds >= ENOUGH and self.more > GROWTH
        return self.errors + [f"memory grew by {self.more:.1f} MiB, {GROWTH:.0f} are allowed"] * grown

    def lines(self) -> list[str]:
        came = Counter({kind: count for (kind, what), count in self.faults.items() if what == "came"})
        sizes = [f"{size:.0f}" for _, size in self.memory][:: max(1, len(self.memory) // 10)]
        judged = "" if self.seconds >= ENOUGH else f" (judged from {ENOUGH:.0f} s on)"
        return [
            f"{self.answers.total()} answers of {len(self.answers)} kinds in {self.seconds:.0f} s; {self.equal} are "
            f"those of the call alone bit for bit, the log-probabilities of the others differ by {self.largest:.1e}",
            f"{came.total()} faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(came.items())),
            f"other than came or were over before: {[each for each in self.faults if each[1] == 'lost']}",
            f"compilations of the prefill: {self.compilations}",
            f"memory: {' '.join(sizes)} MiB, {self.more:+.1f} over the last half{judged}",
            f"wrong: {len(self.wrong())}", *self.wrong()[:10],
        ]  # fmt: skip


class Load:
    """One model, its calls, and what each says alone.

    Args:
        prompts: how many with images.
        of: the kinds of calls, if not all.
        control: what is done wrong on purpose.
    """

    def __init__(
        self, name: str, backend: str, prompts: int, seed: int = 0, control: str | None = None,
        of: Collection[Any] = (),
    ) -> None:  # fmt: skip
        self.name, self.backend, self.seed, self.control = name, backend, seed, control
        with points.fallible():
            alone = self.optimised()
            every = calls(name, alone, prompts)
            self.calls: list[Call] = [call for call in every if not of or (call.make in of and "row" not in call.kind)]
            self.alone: list[Answer] = [call(alone) for call in self.calls]
            self.attributes = attributes(alone)
        self.leaked: list[Any] = []

    def optimised(self) -> Any:
        model = points.fragile(zoo.build(self.name, layers=2))
        return hawk_compile.optimize(model, ratio=RATIO, backend=self.backend)

    def run(self, threads: int, seconds: float, least: int = 1) -> Outcome:
        """So many threads for so long, and until each has made so many calls at least."""
        outcome, lock = Outcome(), threading.Lock()
        begin, stop = threading.Barrier(threads), threading.Event()
        with points.fallible():
            model = self.optimised()
            points.inside_of_graphs[:] = [lambda: self.refuse_locks(model)]
            workers = [
                threading.Thread(target=self.work, args=(model, number, begin, stop, least, outcome, lock))
                for number in range(threads)
            ]
            started = time.monotonic()
            for worker in workers:
                worker.start()
            while (passed := time.monotonic() - started) < seconds:
                outcome.memory.append((passed, resident("RssAnon") / 2**20))
                time.sleep(max(0.02, min(1.0, seconds / 200)))
            stop.set()
            for worker in workers:
                worker.join()
            points.inside_of_graphs.clear()
        outcome.seconds = time.monotonic() - started
        outcome.compilations = model._hawk_runtime.compilations
        outcome.errors += [f"{name} is held at the end" for name in held(model)]
        outcome.errors += self.new_attributes(model)
        return outcome

    def new_attributes(self, model: Any) -> list[str]:
        """What a model has that the one does not which was asked alone."""
        there = attributes(model)
        return [f"the model has a new {name}.{each}" for name, names in there.items()
                for each in set(names) - set(self.attributes.get(name, ()))]  # fmt: skip

    def refuse_locks(self, model: Any) -> None:
        if now := held_here(model):
            raise AssertionError(f"a graph runs while its thread holds {now}")

    def work(
        self, model: Any, number: int, begin: threading.Barrier, stop: threading.Event, least: int, outcome: Outcome,
        lock: Any,
    ) -> None:  # fmt: skip
        """One thread."""
        draw = random.Random(1000 * self.seed + number)
        order = list(range(len(FAULTS)))
        draw.shuffle(order)
        begin.wait()
        made = 0
        while made < least or not stop.is_set():
            place = draw.randrange(len(self.calls))
            try:
                if made and draw.random() < SHARE:
                    order = order[1:] + order[:1]  # each comes as often
                    self.fail(FAULTS[order[0]], model, self.calls[place], draw, outcome, lock)
                self.answer(model, place, outcome, lock)
            except BaseException as error:
                where = traceback.format_exc(limit=-12)
                with lock:
                    outcome.errors.append(f"{self.calls[place].kind}: {type(error).__name__}: {error}\n{where}")
            made += 1

    def answer(self, model: Any, place: int, outcome: Outcome, lock: Any) -> None:
        said = self.calls[place](model)
        if self.control == "answer" and sum(outcome.answers.values()) == 3:
            said.ids[0][-1] += 1
        if self.control == "leak":
            self.leaked.append(bytearray(100_000))
        distance = said.distance(self.alone[place])
        with lock:
            outcome.answers[self.calls[place].kind] += 1
            outcome.equal += distance == 0
            outcome.largest = max(outcome.largest, distance)
            if distance > ROUNDING:
                outcome.errors.append(f"{self.calls[place].kind} differs by {distance:.1e} from the same call alone")

    def fail(self, fault: Fault, model: Any, call: Call, draw: random.Random, outcome: Outcome, lock: Any) -> None:
        came = fault(model, call, draw)
        if self.control == "lock":
            model._hawk_runtime.vision.lock.acquire(blocking=False)
        if self.control == "state":
            under_way.set(Generation(model))
        gc.collect(0)
        with lock:
            outcome.faults[fault.__name__, came] += 1  # type: ignore[attr-defined]
            outcome.errors += [f"{fault.__name__} in {call.kind} left {each}" for each in left_in_thread(model)]  # type: ignore[attr-defined]
            outcome.errors += [f"{fault.__name__} in {call.kind} left {each} held" for each in held_here(model)]  # type: ignore[attr-defined]


def plot(outcome: Outcome, file: str) -> None:
    """Draw memory over time."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([at / 60 for at, _ in outcome.memory], [size for _, size in outcome.memory], linewidth=1)
    axes.set(xlabel="minutes", ylabel="memory of the process (RssAnon), MiB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
