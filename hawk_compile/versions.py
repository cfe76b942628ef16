"""Which releases of torch and transformers this package is tested with, and what the older of them lack.

Both ends of the ranges are tested (`make test-compat`); pyproject.toml has the same ranges.
"""

import importlib.metadata
import warnings
from typing import Any

from hawk_compile.errors import ExportError, UnsupportedModelError, VersionError

RANGES = {"torch": ("2.13", "2.15"), "transformers": ("5.19", "5.23")}
"""The first and the last supported release of each package."""

SINCE = {
    "smolvlm": ("5.21", "before, the model puts its image features in place by an index, which no pass can locate"),
    "qwen4_exp": ("5.23", "before, the model may keep its tokens' positions on the cache itself, where none are cut"),
}
"""Model types that need a later transformers than the first supported one, and why."""

EXPORTS = ("5.23", "before, its exporters write whole models, and no single graph of ours")
"""The transformers that exporting needs, and why."""


NOT_INSTALLED = "not installed"
"""In the place of a version."""


def release(version: str) -> tuple[int, int]:
    """(major, minor) of "5.23.0" or "2.13.0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()))


def installed(package: str) -> str:
    """The version that is installed, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def difference(package: str) -> str:
    """How the installed release of a package differs from those that are supported; empty if it is one of them."""
    first, last = RANGES[package]
    version = installed(package)
    if version != NOT_INSTALLED and release(first) <= release(version) <= release(last):
        return ""
    major, minor = release(last)
    remedy = f"pip install '{package}>={first},<{major}.{minor + 1}'"
    return f"hawk_compile is tested with {package} {first} to {last}, and {version} is here: {remedy}"


def warn_unsupported() -> None:
    """Say by name which package is not of a supported release: it may work, and nobody has tried it."""
    for package in RANGES:
        if text := difference(package):
            warnings.warn(text, UserWarning, stacklevel=3)


def explain(error: ImportError) -> None:
    """Say what an import may have failed for.

    Raises:
        VersionError: names the package that is of no supported release.
    """
    if texts := [text for package in RANGES if (text := difference(package))]:
        raise VersionError(f"{'; '.join(texts)} ({error})") from error


def check_model_release(model: Any) -> None:
    """Refuse a model that the installed transformers has in a form that cannot be pruned.

    Raises:
        UnsupportedModelError: names the release that is needed.
    """
    if text := lacking(type(model).__name__, *SINCE.get(model.config.model_type, ("0.0", ""))):
        raise UnsupportedModelError(text)


def check_exporters() -> None:
    """Refuse to export where the installed transformers cannot.

    Raises:
        ExportError: names the release that is needed.
    """
    if text := lacking("export", *EXPORTS):
        raise ExportError(text)


def lacking(what: str, needed: str, reason: str) -> str:
    """What says that something needs a later transformers; empty if it does not."""
    version = installed("transformers")
    if release(version) >= release(needed):
        return ""
    return (
        f"{what} needs transformers {needed} or newer, and {version} is here ({reason}): "
        f"pip install 'transformers>={needed}'"
    )
