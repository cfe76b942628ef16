"""The command line: what it prints, and that what the user got wrong is one line and exit code 2."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, T5Config
from typer.testing import CliRunner, Result

import hawk_compile
from hawk_compile import Adaptive, selectors
from hawk_compile.compile.pipeline import PASSES
from hawk_compile.errors import InputError
from hawk_compile.progress import Progress
from hawk_compile.tools import environment
from hawk_compile.tools.benchmarking.commands import print_table
from hawk_compile.tools.cli import app
from hawk_compile.tools.commands.common import settings_of
from hawk_compile.tools.terminal import bar
from tests import zoo

SMALL = ("--image-tokens", "64", "--tokens", "20", "--layers", "1")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments: object) -> str:
    """The one line on stderr of a call that must fail."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    assert not result.stdout
    return lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with the configs of a tiny model, and no weights."""
    model = zoo.build("qwen2_5_vl")
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    return tmp_path


def test_env_names_versions_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWK_FUEL", "1")
    shown = call("env").stdout
    for name in ("hawk_compile", "python", *environment.PACKAGES, "gpu", "c++ compiler"):
        assert name in shown
    assert "hawk backend    registered" in shown
    assert "HAWK_FUEL=1" in shown


def test_a_figure_names_where_it_was_measured() -> None:
    shown = environment.measured_on("cpu")
    assert shown.startswith(environment.machine("cpu")) and "threads; torch " in shown
    assert environment.installed("transformers") in shown and environment.machine("cuda") == environment.gpus()


def test_passes_lists_the_pipeline_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAWK_DISABLE", raising=False)
    shown = call("passes").stdout
    places = [shown.index(step.name) for step in PASSES]
    assert places == sorted(places)
    assert shown.count("optional") >= sum(step.optional for step in PASSES)
    assert all(switch in shown for switch in environment.SWITCHES)


def test_passes_shows_what_a_switch_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWK_DISABLE", "refresh_values")
    line = next(line for line in call("passes").stdout.splitlines() if "refresh_values" in line)
    assert line.rstrip().endswith("left out now")
    monkeypatch.setenv("HAWK_DISABLE", "no_such_pass")
    assert "no_such_pass" in refused("passes")


def test_inspect_a_folder(checkpoint: Path) -> None:
    result = call("inspect", checkpoint, *SMALL, "--ratio", "0.75")
    assert result.exit_code == 0, result.output
    for part in (
        "4 heads, 2 KV heads of 16",
        "folded",
        "input_layernorm",
        "64 -> 16",
        "84 -> 36",
        "[1, S, 64]",
        "GFLOP",
    ):
        assert part in result.stdout


def test_inspect_what_cannot_be_pruned(checkpoint: Path, tmp_path: Path) -> None:
    assert "there is no file" in refused("inspect", tmp_path / "nowhere")
    assert "ratio" in refused("inspect", checkpoint, "--ratio", "80")
    assert "image_tokens" in refused("inspect", checkpoint, "--image-tokens", "1")
    (tmp_path / "broken.json").write_text("{")
    assert "no model config" in refused("inspect", tmp_path / "broken.json")
    for config in (Qwen3Config(), T5Config()):
        config.save_pretrained(tmp_path / config.model_type)
        assert config.model_type in refused("inspect", tmp_path / config.model_type / "config.json")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ratio", "1"),
        ("--backend", "nvcc"),
        ("--questions", "4"),
        ("--seed", "-1"),
        ("--out", "no/such/folder/x.png"),
    ],
)
def test_demo_refuses_before_it_loads_anything(arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawk_compile.tools.demo.run.load", lambda: pytest.fail("loaded"))
    assert arguments[0].strip("-") in refused("demo", *arguments)


def test_demo_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawk_compile.tools.demo.run.compiler", lambda: "none: ...")
    assert "aot_eager" in refused("demo")


def test_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawk_compile.tools.demo.run.ROUNDS", 1)
    monkeypatch.setattr("hawk_compile.tools.demo.run.LARGE", (336, 336))
    result = call("demo", "--backend", "eager", "--questions", "8", "--out", tmp_path / "kept.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert "agree on 8 of 8 answers" in " ".join(result.stdout.split())
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("random", "oracle"))]


def test_settings_on_the_command_line() -> None:
    """As JSON, or as text; budgets and selectors with options among them."""
    given = [
        "query=each", "min_per_image=16", "compile_decode=true", 'modalities=["image"]', "budget=0.7",
        'selector={"name": "dart", "pivots": 8}', "head_weights=org/name",
    ]  # fmt: skip
    assert settings_of(given) == {
        "query": "each", "min_per_image": 16, "compile_decode": True, "modalities": ("image",),
        "budget": Adaptive(mass=0.7), "selector": selectors.DART(pivots=8), "head_weights": "org/name",
    }  # fmt: skip
    assert settings_of(['budget={"mass": 0.5, "min": 4}']) == {"budget": Adaptive(mass=0.5, min=4)}
    picture = ("no.png", "What is this?")
    for pair, message in (
        ("query", "set must be NAME=VALUE, got 'query'"),
        ("batch=3", "unknown setting batch"),
        ('budget={"share": 0.5}', "cannot be read"),
        ('selector={"name": "dart", "pivot": 8}', "names 'pivot' for selector"),
    ):
        for command in (("evaluate", "x", "--data", "y"), ("bench",), ("show", "x", *picture), ("export", "x", "y")):
            assert message in refused(*command, "--set", pair)
    assert "query must be one of" in refused("bench", "--set", "query=first", "--backend", "eager")


def test_version() -> None:
    assert call("--version").stdout == f"hawk-compile {hawk_compile.__version__}\n"


def test_arguments_are_checked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is matplotlib asked for before them."""
    monkeypatch.setattr("hawk_compile.tools.writing.importlib.util.find_spec", lambda name: None)
    image = tmp_path / "image.png"
    Image.new("RGB", (28, 28)).save(image)
    show = ("show", "x", image, "What is this?")
    assert "there is no image no.png: correct the path" in refused("show", "x", "no.png", "What is this?")
    assert "ratio is the fraction" in refused(*show, "--ratio", "80")
    assert "did you mean 'hawk'?" in refused(*show, "--selector", "hawks")
    assert 'pip install "hawk-compile[plot]"' in refused(*show)
    for command in (("evaluate", "x", "--data", "y"), ("calibrate", "x", "--data", "y"), ("bench",)):
        told = refused(*command, "--ratios", "50,80")
        assert "each of --ratios is the fraction" in told and "to remove 50 %, give 0.5" in told
    assert f"OUT must be a folder that does not exist yet, got {tmp_path}" in refused("export", "x", tmp_path)
    assert "or --overwrite for an earlier export" in refused("export", "x", tmp_path)
    assert "there is no image no.png: correct the path" in refused("run", "x", "What is this?", "--image", "no.png")


def test_a_name_of_the_hub_is_told_how_to_become_a_folder() -> None:
    for command in (("inspect",), ("bench",), ("export",)):
        told = refused(*command, "Org/Model-7B", *(["out"] if command == ("export",) else []))
        assert "first run `hf download Org/Model-7B --local-dir DIR`, then give DIR" in told


def test_tables_are_whole_where_no_terminal_bounds_them() -> None:
    table = Table("left", "right")
    table.add_row("l" * 60, "r" * 60)
    printed = StringIO()
    print_table(Console(file=printed, width=80), table)
    assert any("l" * 60 in line and "r" * 60 in line for line in printed.getvalue().splitlines())


def test_a_bar_begins_when_something_is_counted() -> None:
    printed = StringIO()
    with pytest.raises(InputError), bar(Console(file=printed), "answers"):
        raise InputError("refused")
    assert not printed.getvalue()
    with bar(Console(file=printed), "answers") as told:
        told(Progress(1, 1))
    assert "answers" in printed.getvalue() and "100%" in printed.getvalue()


def test_what_nobody_expected_says_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        raise ZeroDivisionError("deep")

    monkeypatch.setattr(environment, "describe", lambda: deep(300))
    result = call("env")
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and not result.stdout and len(lines) < 100
    assert "ZeroDivisionError: deep" in lines and "hawk-compile env --report" in lines[-1]
    assert isinstance(call("--debug", "env").exception, ZeroDivisionError)


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(environment, "describe", refuse)
    assert "Permission denied: 'there'" in refused("env")
    assert isinstance(call("--debug", "inspect", "nowhere/at/all").exception, InputError)
