"""What a pass raises when it refuses a graph. Each message names what was looked for, what was found and a remedy."""

from hawk_compile.kernels.errors import HawkError


class GraphError(HawkError, RuntimeError):
    """The graph cannot be pruned; it is left as it was."""


class MergeNotFoundError(GraphError):
    """No node merges visual features into the token embeddings."""


class AttentionNotFoundError(GraphError):
    """No attention that the scoring can read follows the merge."""


class ShapeError(GraphError):
    """A value's shape does not allow pruning: a size that should be symbolic is a number, or is not understood."""
