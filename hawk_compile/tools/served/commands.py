"""What `hawk-compile bench --engine vllm` does, and what it prints."""

from collections.abc import Sequence
from pathlib import Path

from hawk_compile.tools.benchmarking.commands import Command
from hawk_compile.tools.benchmarking.table import as_markdown
from hawk_compile.tools.served.bench import bench_served
from hawk_compile.tools.served.measured import Served
from hawk_compile.tools.served.table import head, tables
from hawk_compile.tools.writing import check_folder


def write(found: Served, folder: Path) -> Sequence[Path]:
    """See `Served.write`."""
    return found.write(folder, as_markdown(head(found), tables(found)))


COMMAND = Command(bench_served, head, tables, write, check_folder)
