"""Every error this package raises on purpose, one tree under `HawkError`.

Each message names the argument, the rule, the value and the remedy. What operators raise is defined in
`hawk_compile.kernels.errors`, what passes raise in `hawk_compile.passes.errors`; this module has all of them.
"""

from hawk_compile.kernels.errors import HawkError, MarkerError, OperandError
from hawk_compile.passes.errors import AttentionNotFoundError, GraphError, MergeNotFoundError, ShapeError


class ConfigError(HawkError, ValueError):
    """A setting is out of its range."""


class HeadWeightsError(HawkError, ValueError):
    """Head weights of the wrong length, sign or type."""


class UnsupportedModelError(HawkError, TypeError):
    """The model cannot be pruned: no vision, an encoder-decoder, no way to hand over encoded images."""


class VersionError(HawkError, ImportError):
    """The installed torch or transformers is of no supported release, and lacks what this package imports."""


class UnsupportedCallError(HawkError, ValueError):
    """A call that pruning does not support, or that would go on with a pruned conversation without knowing of it."""


class InputError(HawkError, ValueError):
    """The inputs of a call contradict each other."""


class CaptureError(GraphError):
    """The model's forward cannot be captured as one graph. The message names the module and line of the model."""


class CompileError(HawkError, RuntimeError):
    """What the settings' backend compiles graphs with failed, or is not installed."""


class ExportError(HawkError, RuntimeError):
    """A model that cannot be exported, or a package that exporting needs and that is not installed."""


class ManifestError(HawkError, ValueError):
    """A folder that is no export, or whose files are not those that were written."""


__all__ = [
    "AttentionNotFoundError",
    "CaptureError",
    "CompileError",
    "ConfigError",
    "ExportError",
    "GraphError",
    "HawkError",
    "HeadWeightsError",
    "InputError",
    "ManifestError",
    "MarkerError",
    "MergeNotFoundError",
    "OperandError",
    "ShapeError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "VersionError",
]
