"""What the test processes are set to.

Each worker of a parallel run has its own cache of compiled kernels: two that write one file at once break it. Garbage
is collected seldom, since the traces that most tests make are large and long-lived.
"""

import gc
import os
import tempfile
from pathlib import Path

gc.set_threshold(200_000, 100, 100)
WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if WORKER is not None:
    folder = Path(tempfile.gettempdir()) / f"torchinductor_tests_{os.getuid()}_{WORKER}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
