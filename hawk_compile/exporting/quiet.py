"""Exporters talk much about themselves; what matters of it is said by errors and by `progress`."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress lines, notices of untested versions and deprecations of other packages; errors pass."""
    exporter = logging.getLogger("torch.onnx")
    level, verbosity = exporter.level, transformers_logging.get_verbosity()
    exporter.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
