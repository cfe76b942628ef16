"""transformers' own tests of one model after another, plain and with every model optimised, and what the difference is.

    HAWK_TRANSFORMERS=/path/to/transformers python tests/huggingface/suites.py [MODEL...] [--ratio .5] [--out FOLDER]

The path is that of a checkout of transformers' repository, of the release that is installed: packages do not hold the
tests. They need `pytest`, `parameterized` and `httpx`, and no network. The ratio is 0 unless given: every number must
be the plain model's then. A test that fails only when wrapped must have a known cause in `causes.json`, where no fault
of ours stands. With another ratio pruning is seen in the numbers, so that only what is raised beside assertions and
refusals counts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import __version__

HERE = Path(__file__).parent
VARIABLE = "HAWK_TRANSFORMERS"
MODELS = ("llava_next", "qwen2_5_vl", "gemma3", "internvl", "llava_onevision", "qwen3_vl", "smolvlm", "idefics3")
ELSEWHERE = ("export", "pipeline", "deepspeed", "flash", "multi_gpu", "fsdp", "tensor_parallel", "training")
"""In the names of tests that need what is not here, or models in training mode, or that neither run a model's forward
nor generate."""
LONGEST = 3600
"""Seconds that the tests of one model may take."""


@dataclass(frozen=True)
class Cause:
    """Why a test may fail when wrapped: `test` is found in its name, `error` in its error, by regular expressions."""

    test: str
    error: str
    cause: str

    def explains(self, test: str, error: str) -> bool:
        return bool(re.search(self.test, test) and re.search(self.error, error))


PRUNED = Cause("", r"^AssertionError|hawk_compile\.errors\.", "pruned: other numbers or lengths, or refused by name")
"""With another ratio than 0."""


@dataclass(frozen=True)
class Outcome:
    """One test: 'passed', 'skipped' or 'failed', its first error, and how often a wrapped model prefilled in it."""

    outcome: str
    error: str
    prefills: int


@dataclass(frozen=True)
class Compared:
    """The tests of one model, plain and wrapped.

    Attributes:
        plain, wrapped: how many of those that pass plain there are, and pass wrapped.
        prefilled: how many of the latter ran a wrapped model's prefill.
        known: cause -> the tests that fail only when wrapped, by it.
        unknown: test -> its error, of those that fail only when wrapped without a known cause.
    """

    plain: int
    wrapped: int
    prefilled: int
    known: dict[str, list[str]]
    unknown: dict[str, str]


def missing() -> str:
    """Why the tests cannot be run here; '' if they can."""
    path = os.environ.get(VARIABLE)
    if not path:
        return f"{VARIABLE} is not set: give it the path of a checkout of transformers {__version__}, with its tests"
    if not (Path(path) / "tests/models").is_dir():
        return f"{VARIABLE}={path} holds no tests/models: give the path of a checkout of transformers' repository"
    named = re.search(r'__version__ = "(.*)"', (Path(path) / "src/transformers/__init__.py").read_text())
    if named is None or named[1] != __version__:
        of = "of no release" if named is None else named[1]
        return f"{VARIABLE}={path} is {of}, and transformers {__version__} is installed: check out v{__version__}"
    return ""


def run(model: str, ratio: float | None, folder: Path) -> dict[str, Outcome]:
    """The outcomes of a model's tests, by name; `ratio` None leaves the models as they are."""
    checkout = Path(os.environ[VARIABLE])
    files = sorted(checkout.glob(f"tests/models/{model}/test_modeling_{model}.py"))
    if not files:
        raise FileNotFoundError(f"{checkout} has no tests of {model}: give a name of a folder in tests/models")
    name = f"{model}-{'plain' if ratio is None else f'{ratio:g}'}"
    outcomes = folder / f"{name}.jsonl"
    chosen = " and ".join(f"not {word}" for word in ELSEWHERE)
    wrap = [] if ratio is None else ["--wrap", str(ratio)]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "wrapping", "-p", "no:cacheprovider", "-W", "ignore",
             "--outcomes", str(outcomes), *wrap, "-k", chosen, *map(str, files)],
            cwd=checkout, stdout=log, stderr=subprocess.STDOUT, timeout=LONGEST, check=False,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    if done.returncode > 1:  # neither all passed nor some failed
        raise RuntimeError(f"the tests of {model} did not run to their end:\n{Path(log.name).read_text()[-2000:]}")
    return read(outcomes)


def read(file: Path) -> dict[str, Outcome]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        f"{line['class']}::{line['test']}": Outcome(line["outcome"], line["error"], line["prefills"]) for line in lines
    }


def known_causes(ratio: float = 0) -> list[Cause]:
    known = [Cause(**cause) for cause in json.loads((HERE / "causes.json").read_text())]
    return [*known, PRUNED] if ratio else known


def compare(plain: dict[str, Outcome], wrapped: dict[str, Outcome], causes: Sequence[Cause]) -> Compared:
    """What fails only when wrapped, and why. A test that is no longer run counts as one that fails."""
    passed = [test for test, outcome in plain.items() if outcome.outcome == "passed"]
    known: dict[str, list[str]] = {}
    unknown: dict[str, str] = {}
    good = []
    for test in passed:
        now = wrapped.get(test, Outcome("lost", "it was not run", 0))
        if now.outcome == "passed":
            good.append(now)
            continue
        error = now.error or f"it was {now.outcome}"
        cause = next((cause.cause for cause in causes if cause.explains(test, error)), None)
        if cause is None:
            unknown[test] = error
        else:
            known.setdefault(cause, []).append(test)
    return Compared(len(passed), len(good), sum(outcome.prefills > 0 for outcome in good), known, unknown)


def table(results: dict[str, Compared]) -> str:
    """Markdown: a line for each model, then each cause with its tests."""
    lines = ["| model | passed plain | passed wrapped | of these with a prefill | known causes | unknown |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for model, each in results.items():
        known = sum(map(len, each.known.values()))
        lines.append(f"| {model} | {each.plain} | {each.wrapped} | {each.prefilled} | {known} | {len(each.unknown)} |")
    counts = Counter({cause: 0 for each in results.values() for cause in each.known})
    tests: dict[str, set[str]] = {}
    for each in results.values():
        for cause, names in each.known.items():
            counts[cause] += len(names)
            tests.setdefault(cause, set()).update(name.partition("::")[2] for name in names)
    lines += ["", *(f"- {count} x {cause}: {', '.join(sorted(tests[cause]))}" for cause, count in counts.most_common())]
    lines += [f"- UNKNOWN {model} {test}: {error}" for model, each in results.items()
              for test, error in each.unknown.items()]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="folders in tests/models")
    parser.add_argument("--ratio", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="where outcomes and logs stay")
    asked = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    folder = asked.out or Path(tempfile.mkdtemp(prefix="hawk-suites-"))
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for model in asked.models:
        plain, wrapped = run(model, None, folder), run(model, asked.ratio, folder)
        results[model] = compare(plain, wrapped, known_causes(asked.ratio))
    print(table(results))
    return any(each.unknown for each in results.values())


if __name__ == "__main__":
    sys.exit(main())
