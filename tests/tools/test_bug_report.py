"""`hawk-compile env`: what a bug report needs, and nothing that is its writer's own business."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.tools import bug_report, environment
from tests.tools.test_cli import call

TEMPLATE = Path(__file__).parents[2] / ".github/ISSUE_TEMPLATE/bug_report.md"


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


def test_the_issue_template_is_the_form_that_env_prints() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    front, _, body = template.removeprefix("---\n").partition("---\n")
    assert "name: Bug report" in front and "hawk-compile env --report" in body
    assert headings(body) == list(bug_report.SECTIONS) and len(bug_report.SECTIONS) == 6
    assert body.partition("-->\n\n")[2] == bug_report.report()


def test_the_report_is_filled_in() -> None:
    printed = call("env", "--report").stdout
    assert headings(printed) == list(bug_report.SECTIONS)
    filled = printed.partition(f"## {bug_report.ENVIRONMENT}")[2]
    for name in ("hawk_compile", "python", "platform", "gpu", "c++ compiler", *environment.PACKAGES):
        assert re.search(rf"^{re.escape(name)}: \S", filled, flags=re.MULTILINE), name
    assert printed.count("```") == 6 and filled.rstrip().endswith("```")


def test_nothing_personal_is_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment.Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(environment.getpass, "getuser", lambda: "ada")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_ada")
    monkeypatch.setenv("HAWK_DUMP", "/home/ada/graphs")
    monkeypatch.setenv("TORCH_SHARED", "redis://ada:hunter2@host:1/0")
    for name in ("VLLM_API_KEY", "TORCH_TOKEN", "HAWK_SECRET", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    shown = json.loads(call("env", "--json").stdout)
    switches = shown["switches"].split(", ")
    assert {"TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor_USER", "HAWK_DUMP=~/graphs"} <= set(switches)
    assert "TORCH_SHARED=redis://host:1/0" in switches
    assert "ada" not in re.findall(r"\w+", " ".join(shown.values())) and "hunter2" not in str(shown)
    told = call("env", "--model", tmp_path / "ada" / "none").stdout
    assert "/ada" not in told and "there is no file" in told


@pytest.mark.parametrize("home", ["/", None])
def test_who_runs_it_may_have_no_name_and_no_home(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    """As in a container that runs by a number which no system file knows."""

    def nobody(*_: Any) -> Any:
        raise KeyError("getpwuid(): uid not found: 1234")

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.getpass, "getuser", nobody)
    monkeypatch.setattr(environment.Path, "home", nowhere if home is None else lambda: Path(home))
    assert environment.anonymous("HAWK_DUMP=/srv/graphs, redis://ada:hunter2@host") == "HAWK_DUMP=/srv/graphs, redis://host"


def test_what_is_found_in_a_model_stands_in_it(tmp_path: Path) -> None:
    shown = json.loads(call("env", "--json", "--model", "mllama").stdout)
    assert "cross-attention" in shown["refused"] and shown["torch"]
    (tmp_path / "config.json").write_text('{"model_type": "t5", "dtype": "float32"}')
    (tmp_path / "head_weights.json").write_text("[1]")
    shown = json.loads(call("env", "--json", "--model", tmp_path).stdout)
    assert shown["config.model_type"] == "t5" and shown["beside it"] == "head_weights.json"
    assert shown["passes"].startswith("UnsupportedModelError: ")
