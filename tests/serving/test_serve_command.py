"""`hawk-compile serve`: vLLM's own command, written for the user."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from hawk_compile.tools.cli import app


def printed(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["serve", "org/model", "--print", *arguments])
    return result.exit_code, result.stdout, result.stderr


def overrides(text: str) -> tuple[dict[str, Any], list[str]]:
    words = shlex.split(text)
    place = words.index("--hf-overrides")
    return json.loads(words[place + 1]), words[:place] + words[place + 2 :]


def test_the_command() -> None:
    code, out, _ = printed("--ratio", "0.9", "--set", "selector=divprune", "--port", "8001", "--max-model-len", "4096")
    said, rest = overrides(out)
    assert code == 0 and said == {"hawk": {"ratio": 0.9, "selector": "divprune"}}
    assert rest[:5] == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"]
    assert rest[5:] == ["--port", "8001", "--max-model-len", "4096"]


@pytest.mark.parametrize("given", [["--hf-overrides", '{"rope_theta": 1}'], ['--hf-overrides={"rope_theta": 1}']])
def test_overrides_of_the_users_own_are_kept(given: list[str]) -> None:
    _, out, _ = printed(*given)
    said, rest = overrides(out)
    assert said == {"rope_theta": 1, "hawk": {"ratio": 0.8}} and len(rest) == 5


@pytest.mark.parametrize(("arguments", "message"), [
    (("--ratio", "80"), "to remove 80 %, give 0.8"),
    (("--set", "quota=image"), "quota cannot be set for a server"),
    (("--set", "selector"), "set must be NAME=VALUE"),
    (("--hf-overrides", '{"hawk": {}}'), "--hf-overrides holds hawk already"),
    (("--hf-overrides", "hawk"), "must be an object of JSON"),
])  # fmt: skip
def test_what_is_refused_before_anything_runs(arguments: tuple[str, ...], message: str) -> None:
    code, out, error = printed(*arguments)
    assert code == 2 and message in error and not out


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawk_compile.tools.serve.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["serve", "org/model"])
    assert result.exit_code == 2 and "pip install vllm" in result.stderr
    assert "--hf-overrides" in result.stdout
