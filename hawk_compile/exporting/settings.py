"""The settings of an export: those of `optimize` that a folder can carry, and the format's own."""

from dataclasses import MISSING, fields
from typing import Any

from hawk_compile.errors import ConfigError
from hawk_compile.settings.closest import meant
from hawk_compile.settings.config import HawkConfig, make_config

TAKEN = (
    "ratio", "head_weights", "normalization", "selector", "selector_options", "query", "modalities", "processor",
    "vision_end_token_id", "end_of_turn_token_id",
)  # fmt: skip
"""Settings of `optimize` that an export of any format takes."""


def settings_of(
    target: Any, format: str, config: HawkConfig | None, settings: dict[str, Any]
) -> tuple[HawkConfig, Any]:
    """The checked settings, and the format's own options (None where it has none).

    Raises:
        ConfigError: a setting that is out of its range, or that an export of this format does not take.
    """
    known = getattr(target, "SETTINGS", ())
    own = {name: given for name, given in settings.items() if name in known}
    others = {name: given for name, given in settings.items() if name not in known}
    if unknown := sorted(others.keys() - {field.name for field in fields(HawkConfig)}):
        raise ConfigError(
            f"unknown setting {', '.join(unknown)} of format={format!r}; its settings are "
            f"{', '.join((*TAKEN, *known))}{meant(unknown[0], (*TAKEN, *known))}"
        )
    made = make_config(config, others)
    check_taken(made)
    return made, target.options(own) if hasattr(target, "options") else None


def check_taken(config: HawkConfig) -> None:
    """Refuse, by name, what a folder cannot carry."""
    for field in fields(config):
        given = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in TAKEN and given != default:
            raise ConfigError(
                f"{field.name}={given!r} cannot be exported: an export takes {', '.join(TAKEN)}; leave it out"
            )
    if not config.method.portable:
        raise ConfigError(
            f'selector "{config.method.name}" cannot be exported: it takes tokens one after another, or has operators '
            "that only PyTorch has (portable=False); optimize runs it; export another one"
        )
