"""The root of this package's errors, and what its operators raise."""


class HawkError(Exception):
    """Base of all that this package raises on purpose."""


class OperandError(HawkError, ValueError):
    """An argument of an operator has a rank, dtype, size or value that cannot be right."""


class MarkerError(HawkError, RuntimeError):
    """A marker that a pass replaces was run: the graph that holds it was never rewritten."""
