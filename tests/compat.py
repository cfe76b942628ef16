"""The suite's core at both ends of the supported releases of torch and transformers, each in an environment of its own.

    python tests/compat.py low          an older transformers laid over this environment: cheap, CI runs it
    python tests/compat.py low high     and a later torch in an environment of its own, some 6 GB

Environments lie in .compat (or where HAWK_COMPAT says), are made at the first run and kept. What an older release lacks
is refused by name, and the tests of that feature expect the refusal (tests/conftest.py).
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("HAWK_COMPAT", ROOT / ".compat"))
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")

LOW_TRANSFORMERS = "5.19.0"
HIGH_TORCH, HIGH_TRANSFORMERS = "2.14.1", "5.23.0"
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "accelerate", "peft", "scikit-learn")
OF_TORCH = ("torch", "torchao", "triton", "executorch")
"""Pinned beside one release of torch, and of no use beside another."""

OF_TRANSFORMERS = ("test_architectures.py", "test_zoo.py", "test_golden_path.py", "test_versions.py", "test_compat.py",
                   "capture", "compile", "passes", "plan", "runtime")  # fmt: skip
"""Tests that see transformers."""
OF_BOTH = (*OF_TRANSFORMERS, "kernels", "settings")


@dataclass(frozen=True)
class Environment:
    """A Python that has the package, and what it needs to be told; `tests` are files and folders in tests/."""

    python: Path
    tests: tuple[str, ...]
    variables: Mapping[str, str]


@functools.cache
def low() -> Environment:
    """The environment that runs this script, with the first supported transformers laid over it."""
    packages = FOLDER / f"transformers-{LOW_TRANSFORMERS}"
    if not (packages / "transformers").is_dir():
        pip(Path(sys.executable), "--no-deps", "--target", str(packages), f"transformers=={LOW_TRANSFORMERS}")
    return Environment(Path(sys.executable), OF_TRANSFORMERS, {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"})


@functools.cache
def high() -> Environment:
    """An environment with the last torch that can be had as a file here, and the last supported transformers."""
    folder = FOLDER / f"torch-{HIGH_TORCH}"
    python, ready = folder / "bin/python", folder / ".ready"
    if not ready.is_file():
        venv.create(folder, with_pip=True)
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        others = folder / "constraints.txt"
        others.write_text("\n".join(pin for pin in pins if pin.partition("==")[0] not in OF_TORCH) + "\n")
        wanted = (f"torch=={HIGH_TORCH}", f"transformers=={HIGH_TRANSFORMERS}", *TOOLS)
        pip(python, "--constraint", str(others), *wanted, "--editable", f"{ROOT}[onnx]")
        ready.touch()
    return Environment(python, OF_BOTH, {"PYTHONPATH": str(ROOT)})


VERSIONS = """
import platform, torch, transformers
print(platform.python_version(), torch.__version__, transformers.__version__)
"""
ENDS: dict[str, Callable[[], Environment]] = {"low": low, "high": high}


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, *PIP, *arguments], check=True)


def run(end: str, workers: int, options: list[str]) -> tuple[str, bool]:
    """Run an end's tests: a row of the table, and whether all passed."""
    environment = ENDS[end]()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment.variables}
    versions = subprocess.run(
        [environment.python, "-c", VERSIONS], env=variables, capture_output=True, text=True, check=True
    )
    tests = [str(ROOT / "tests" / name) for name in environment.tests]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        subprocess.run(
            [environment.python, "-m", "pytest", "--quiet", "-m", "not slow", "--numprocesses", str(workers),
             "--no-loadscope-reorder", f"--junitxml={results}", *options, *tests],
            cwd=ROOT, env=variables, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        suite = ElementTree.parse(results).getroot()[0]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    cells = [end, *versions.stdout.split(), total - failed - skipped, failed, skipped, round(seconds)]
    return "".join(f"| {cell} " for cell in cells) + "|", total > skipped and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="+", choices=ENDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--options", default="", help="more options of pytest, in one string")
    given = parser.parse_args()
    rows, passed = zip(*(run(end, given.workers, given.options.split()) for end in given.ends), strict=True)
    head = ("end", "Python", "torch", "transformers", "passed", "failed", "skipped", "seconds")
    print("".join(f"| {name} " for name in head) + "|", "| --- " * len(head) + "|", *rows, sep="\n")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
