"""Draw models and calls of them, and hold each to the plain model, for as long as is asked.

    python -m tests.fuzz --seconds 600 --seed 7         draws; prints what it finds, and exits 1 if it finds anything
    python -m tests.fuzz --case '{"model": ...}'        one case again
    python -m tests.fuzz --control flipped              with a fault put in: must find it, and exits 1 if it does not

Every finding is printed as a case, made small by hypothesis.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from hawk_compile.errors import HawkError
from tests.fuzz import drawing, tiny
from tests.fuzz.built import Case
from tests.fuzz.controls import CONTROLS
from tests.fuzz.holding import Upstream, hold
from tests.fuzz.refusals import name_of

CALLS = 250
"""Drawn for one model: compiling it takes seconds, a call some hundredths of one."""


@dataclass
class Tally:
    """What a run came to.

    Attributes:
        refused: kind of refusal -> how often.
        found: (kind, case) of each finding.
    """

    cases: int = 0
    prompts: int = 0
    pruned: int = 0
    ties: int = 0
    unsure: int = 0
    upstream: int = 0
    models: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    found: list[tuple[str, Case]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.began
        lines = [
            f"{self.prompts} prompts, {self.pruned} of them pruned, in {self.cases} calls of {self.models} models, "
            f"{seconds:.0f} s, {self.prompts / seconds:.1f} prompts/s; "
            f"{self.ties} decided by rounding, {self.unsure} by the product's own rule for who votes; "
            f"{self.upstream} calls that transformers itself answers wrongly; "
            f"{sum(self.refused.values())} refused, {len(self.found)} findings",
            *(f"  refused {count} times: {kind}" for kind, count in self.refused.most_common()),
            *(f"  FOUND {kind}" for kind, _ in self.found),
        ]
        return "\n".join(lines)


def one(case: Case, tally: Tally) -> None:
    """Hold a case, and count it.

    Raises:
        Exception: what is found.
    """
    try:
        held = tiny.hold(case) if "tiny" in case["model"] else hold(case)
    except Upstream:
        tally.upstream += 1
        return
    except HawkError as error:
        kind = name_of(error, case)
        if kind is None:
            raise
        tally.refused[kind] += 1
        tally.cases += 1
        return
    tally.cases += 1
    if isinstance(held, int):
        tally.prompts += held
        return
    tally.prompts += held.prompts
    tally.pruned += held.pruned
    tally.ties += held.ties
    tally.unsure += held.unsure


def round_of(number: int, made: Case, calls: int, tally: Tally, until: float, small: bool = True) -> None:
    """Draw calls of one model, up to the first finding, which is made small."""
    last: list[Case] = []
    tally.models += 1

    phases = (Phase.generate, Phase.shrink) if small else (Phase.generate,)

    @seed(number)
    @settings(max_examples=calls, database=None, deadline=None, phases=phases, print_blob=False,
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
    @given(tiny.calls(made) if "tiny" in made else drawing.calls(made))
    def draw(call: Case) -> None:
        if time.monotonic() > until and not last:
            return
        case = {"model": made, "call": call}
        try:
            one(case, Tally() if last else tally)
        except Exception:
            last[:] = [case]
            raise

    try:
        draw()
    except Exception as error:
        tally.found.append((f"{type(error).__name__}: {error}"[:600], last[0]))
        print(f"FOUND with seed {number}: {type(error).__name__}: {error}"[:3000])
        print(f"  python -m tests.fuzz --case '{json.dumps(last[0])}'", flush=True)


def model_of(number: int) -> Case:
    """Every sixth model is one of tests/architectures."""
    return {"tiny": tiny.NAMES[number // 6 % len(tiny.NAMES)]} if number % 6 == 5 else drawing.model(number)


def run(seconds: float, number: int, calls: int = CALLS, prompts: float = float("inf"), quiet: bool = False) -> Tally:
    """Draw until the time is over, or so many prompts are held."""
    tally, until = Tally(), time.monotonic() + seconds
    for one_round in range(10**6):
        if time.monotonic() > until or tally.prompts >= prompts:
            break
        made = model_of(number + one_round)
        round_of(number + one_round, made, calls // 5 if "tiny" in made else calls, tally, until)
        if not quiet:
            print(f"{number + one_round} {json.dumps(made)}: {tally}".split("\n")[0], flush=True)
    return tally


def again(text: str) -> int:
    """One case, as a finding prints it."""
    tally = Tally()
    try:
        one(json.loads(text), tally)
        print(tally)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="of the first model; by default drawn, and printed")
    parser.add_argument("--prompts", type=float, default=float("inf"), help="stop behind so many")
    parser.add_argument("--calls", type=int, default=CALLS, help="of each model")
    parser.add_argument("--case", help="a case as JSON, which is held again")
    parser.add_argument("--control", choices=CONTROLS, help="a fault that must be found")
    given_ = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if given_.case:
        return again(given_.case)
    number = time.time_ns() % 10**6 if given_.seed is None else given_.seed
    print(f"seed {number}", flush=True)
    if given_.control:
        with CONTROLS[given_.control]():
            tally = run(given_.seconds, number, given_.calls, given_.prompts)
        print(tally)
        return 0 if tally.found else 1
    tally = run(given_.seconds, number, given_.calls, given_.prompts)
    print(tally)
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
