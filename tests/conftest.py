"""Each worker of a parallel run has its own cache of compiled kernels: two that write one file at once break it."""

import os
import tempfile
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if WORKER is not None:
    folder = Path(tempfile.gettempdir()) / f"torchinductor_tests_{os.getuid()}_{WORKER}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
