"""What the test processes are set to.

Each worker of a parallel run has its own cache of compiled kernels: two that write one file at once break it. It
compiles by itself: where workers take all cores already, a pool of Inductor's for each only has to be started. Garbage
is collected seldom, since the traces that most tests make are large and long-lived.

Files are spread over the workers whole. Those that share what takes long to make stay together: models that are
captured once (`runtime`), the libraries of the export formats and the C++ headers that Inductor compiles first
(`exporting`), and the process that interprets Triton (`kernels`). What takes longest starts first.

Machines differ by a factor of four, and CI has a limit: with `HAWK_TESTS_UNTIL`, in seconds since 1970, no test begins
later. Those left out are reported as skipped, and which ones they are differs from run to run.
"""

import gc
import os
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from hawk_compile.errors import ExportError, UnsupportedModelError
from hawk_compile.versions import installed, release
from tests.timm_at_hand import declare_operators

declare_operators()
gc.set_threshold(200_000, 100, 100)
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
UNTIL = int(os.environ.get("HAWK_TESTS_UNTIL", 0))

if WORKER is not None:
    folder = Path(tempfile.gettempdir()) / f"torchinductor_tests_{os.getuid()}_{WORKER}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

CAPTURED = (
    "assisted", "batches", "caches", "decoding", "later_images", "load", "optimize", "turns", "refusals", "reports",
    "pruned", "side_by_side",
)  # fmt: skip
TOGETHER = {
    **{f"tests/runtime/test_{name}.py": "runtime" for name in CAPTURED},
    "tests/compile/test_inductor.py": "exporting", "tests/exporting": "exporting", "tests/saved": "exporting",
    "tests/kernels": "kernels",
}  # fmt: skip
"""Files and folders -> what they share."""

LONGEST = ("test_inductor.py", "exporting", "runtime", "tools", "test_audio.py", "test_architectures.py", "compile")
"""Files and folders, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        found = [number for number, name in enumerate(LONGEST) if name in item.path.parts]
        return found[0] if found else len(LONGEST)

    items.sort(key=place)
    if UNTIL:
        files = sorted({item.path for item in items})
        random.Random(UNTIL).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if UNTIL and time.time() > UNTIL:
        pytest.skip("no time is left (HAWK_TESTS_UNTIL)")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Where the installed transformers lacks what a model, or an export, needs, their tests meet that refusal."""
    try:
        return (yield)
    except (UnsupportedModelError, ExportError) as error:
        needed = re.search(r"needs transformers (\S+) or newer", str(error))
        if needed is None or release(installed("transformers")) >= release(needed[1]):
            raise
        return True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file) or TOGETHER.get(file.rpartition("/")[0], file)

    return Groups(config, log)
