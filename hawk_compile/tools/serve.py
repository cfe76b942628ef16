"""What `hawk-compile serve` does: writes vLLM's own command for a checkpoint that is served pruned, and runs it."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from hawk_compile.errors import ConfigError, UnsupportedModelError
from hawk_compile.serving.settings import KEY, serving_config

SERVER = "vllm.entrypoints.openai.api_server"
OVERRIDES = "--hf-overrides"


def server_command(checkpoint: str, settings: dict[str, Any], others: Sequence[str]) -> list[str]:
    """The command that serves a checkpoint (a folder or a Hub repository) pruned.

    Args:
        settings: see `hawk_compile.serving.settings`.
        others: vLLM's own arguments. Overrides among them are kept, and joined with the settings.

    Raises:
        ConfigError: settings or overrides that cannot be.
    """
    serving_config(settings)
    rest, overrides = taken_out(others)
    if KEY in overrides:
        raise ConfigError(f"{OVERRIDES} holds {KEY} already: give its settings here or there")
    joined = json.dumps({**overrides, KEY: settings})
    return [sys.executable, "-m", SERVER, "--model", checkpoint, OVERRIDES, joined, *rest]


def taken_out(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(the arguments without overrides, the overrides)."""
    rest: list[str] = []
    found: dict[str, Any] = {}
    left = iter(arguments)
    for each in left:
        name, equals, value = each.partition("=")
        if name != OVERRIDES:
            rest.append(each)
            continue
        text = value if equals else next(left, "")
        try:
            found = json.loads(text)
        except ValueError:
            found = {}
        if not isinstance(found, dict) or not found:
            raise ConfigError(f"{OVERRIDES} must be an object of JSON, got {text!r}")
    return rest, found


def serve(
    say: Callable[[str], None], checkpoint: str, settings: dict[str, Any], others: Sequence[str], run: bool
) -> None:
    """Print the command; with `run`, become it.

    Raises:
        UnsupportedModelError: vLLM is not installed.
    """
    command = server_command(checkpoint, settings, others)
    say(shlex.join(["python", *command[1:]]))
    if not run:
        return
    if find_spec("vllm") is None:
        raise UnsupportedModelError(
            "serving needs vLLM, which is not installed here: run `pip install vllm` in this environment, or pass "
            "--print and run the command where it is"
        )
    sys.stdout.flush()
    os.execv(command[0], command)
