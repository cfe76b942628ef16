"""What the test processes are set to.

Each worker of a parallel run has its own cache of compiled kernels: two that write one file at once break it. Garbage
is collected seldom, since the traces that most tests make are large and long-lived.
"""

import gc
import os
import tempfile
from pathlib import Path

import pytest

gc.set_threshold(200_000, 100, 100)
WORKER = os.environ.get("PYTEST_XDIST_WORKER")

if WORKER is not None:
    folder = Path(tempfile.gettempdir()) / f"torchinductor_tests_{os.getuid()}_{WORKER}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))

LONGEST = ("exporting", "test_inductor.py", "runtime", "test_architectures.py", "test_backend.py")
"""Files and folders that take longest, which start first, so that the workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        found = [number for number, name in enumerate(LONGEST) if name in item.path.parts]
        return found[0] if found else len(LONGEST)

    items.sort(key=place)
