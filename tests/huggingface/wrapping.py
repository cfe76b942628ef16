"""A plugin of pytest for transformers' own tests: every model that can be pruned is optimised, and each test's outcome
is written down.

    python -m pytest -p wrapping --outcomes FILE [--wrap RATIO] TESTS

It runs in a process whose `tests` are those of transformers, so it imports nothing of ours but the package.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, set_seed

import hawk_compile
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.runtime import forward, overrides
from hawk_compile.runtime.state import RUNTIME

ATTENTIONS = "has_attentions"
WORST = ("passed", "skipped", "failed")
LONGEST = 2000
"""Characters of an error that are written down."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="a file: one line of JSON for each test")
    parser.addoption("--wrap", type=float, help="optimise every model, with this ratio; left out, none")


def pytest_configure(config: pytest.Config) -> None:
    plugin = Outcomes(Path(config.getoption("--outcomes")))
    config.pluginmanager.register(plugin)
    if (ratio := config.getoption("--wrap")) is not None:
        wrap_models(ratio)
        count_prefills(plugin)
        show_compiled_steps()


def wrap_models(ratio: float) -> None:
    """Optimise each model that is put in evaluation mode, which is what every test but those of training does."""
    plain: Callable[..., Any] = PreTrainedModel.eval

    def evaluated(self: PreTrainedModel) -> PreTrainedModel:
        model = plain(self)
        if RUNTIME not in model.__dict__ and model.can_generate():
            with contextlib.suppress(UnsupportedModelError):  # a language model: a part of what is wrapped as a whole
                hawk_compile.optimize(model, ratio=ratio, backend="eager")
        return model

    PreTrainedModel.eval = evaluated  # type: ignore[method-assign]


def count_prefills(plugin: "Outcomes") -> None:
    """A test that never prefills says nothing of pruning."""
    run: Callable[..., Any] = forward.run_prefill

    def counted(*args: Any, **kwargs: Any) -> Any:
        plugin.prefills += 1
        return run(*args, **kwargs)

    forward.run_prefill = counted


def show_compiled_steps() -> None:
    """Tests of compiled generation ask whether transformers compiled the decode step, by where it keeps it."""
    compiled: Callable[..., Any] = overrides.compiled_call

    def compiled_call(self: PreTrainedModel, *args: Any) -> Any:
        self.__dict__["_compiled_call"] = compiled(self, *args)
        return self.__dict__["_compiled_call"]

    overrides.compiled_call = compiled_call


class Outcomes:
    """Writes a line when a test is over: its name, outcome, first error, seconds, and prefills of wrapped models."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.prefills = 0
        self.reports: list[Any] = []
        file.write_text("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Every test draws the same ids and pixels in each run. Those of generation check much beside attention
        matrices, for which a pruned prefill is refused: these are left out, as of models that have none."""
        set_seed(0)
        if (drawing := sys.modules.get("tests.test_modeling_common")) is not None:
            drawing.global_rng.seed(0)
        tests: Any = getattr(item, "cls", None)
        plain = getattr(tests, ATTENTIONS, None)
        if plain is not None and item.get_closest_marker("generate"):
            setattr(tests, ATTENTIONS, False)
        try:
            return (yield)
        finally:
            if plain is not None:
                setattr(tests, ATTENTIONS, plain)

    def pytest_runtest_logstart(self) -> None:
        self.prefills = 0
        self.reports = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self.reports if report.failed]
        line = {
            "test": nodeid.rpartition("::")[2],
            "class": nodeid.split("::")[-2],
            "outcome": max((report.outcome for report in self.reports), key=WORST.index),
            "error": error_of(failed[0]) if failed else "",
            "seconds": round(sum(getattr(report, "duration", 0) for report in self.reports), 2),
            "prefills": self.prefills,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def error_of(report: Any) -> str:
    """What was raised and where: class, message, file and line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longrepr)[-LONGEST:]
    return f"{crash.message[:LONGEST]} ({crash.path}:{crash.lineno})"
