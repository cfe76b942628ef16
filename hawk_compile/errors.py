"""Every error this package raises on purpose. Each message names the argument, the rule, the value and the remedy."""

from hawk_compile.passes.errors import AttentionNotFoundError, GraphError, MergeNotFoundError, ShapeError


class HawkError(Exception):
    """Base of the errors that concern a call of this package."""


class ConfigError(HawkError, ValueError):
    """A setting is out of its range."""


class HeadWeightsError(HawkError, ValueError):
    """Head weights of the wrong length, sign or type."""


class UnsupportedModelError(HawkError, TypeError):
    """The model cannot be pruned: no vision, an encoder-decoder, no way to hand over encoded images."""


class UnsupportedCallError(HawkError, ValueError):
    """A call of an optimised model that pruning does not support."""


class InputError(HawkError, ValueError):
    """The inputs of a call contradict each other."""


class ExportError(HawkError, RuntimeError):
    """A model that cannot be exported, or a package that exporting needs and that is not installed."""


class ManifestError(HawkError, ValueError):
    """A folder that is no export, or whose files are not those that were written."""


__all__ = [
    "AttentionNotFoundError",
    "ConfigError",
    "ExportError",
    "GraphError",
    "HawkError",
    "HeadWeightsError",
    "InputError",
    "ManifestError",
    "MergeNotFoundError",
    "ShapeError",
    "UnsupportedCallError",
    "UnsupportedModelError",
]
