"""Which options of `bench` belong to which engine; asked before either is imported."""

from typing import Any

from hawk_compile.errors import ConfigError
from hawk_compile.settings.config import check_choice

ENGINES = ("torch", "vllm")


def check_options(engine: str, only: dict[str, dict[str, Any]]) -> None:
    """Refuse options that another engine has.

    Args:
        only: engine -> the options that it alone has, by name; None or nothing: not given.

    Raises:
        ConfigError: an unknown engine, or an option of another one.
    """
    check_choice("engine", engine, ENGINES)
    for name, options in only.items():
        for option, value in options.items():
            if name != engine and value is not None and value != []:
                raise ConfigError(
                    f"--{option} is for engine {name}, and engine is {engine}: leave it out, or give --engine {name}"
                )


def told(**options: Any) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}
