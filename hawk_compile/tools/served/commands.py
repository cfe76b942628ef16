"""What `hawk-compile bench --engine vllm` does, and what it prints."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from hawk_compile.tools.benchmarking.commands import show, source_of
from hawk_compile.tools.benchmarking.table import as_markdown
from hawk_compile.tools.served.bench import bench_served
from hawk_compile.tools.served.table import head, tables
from hawk_compile.tools.terminal import counts, fractions_of, names
from hawk_compile.tools.writing import check_folder


def bench_engine(
    console: Console, checkpoint: Path | None, config: str | None, out: Path | None, *, ratios: str, markdown: bool,
    tokens: str | None = None, stages: str | None = None, **given: Any,
) -> None:  # fmt: skip
    """Benchmark a checkpoint folder or a profile in vLLM, print the tables, and write them if a folder is given.

    Raises:
        as `bench_served`; ConfigError too for lists that hold something else than numbers.
        InputError: both a checkpoint and a profile, or a folder that cannot be written to.
    """
    source = source_of(checkpoint, config)
    fractions = fractions_of(ratios)
    if out is not None:
        check_folder(out)
    if stages is not None:
        given["stages"] = names(stages)
    if tokens is not None:
        given["tokens"] = counts(tokens)
    with console.status("") as status:
        found = bench_served(
            source, ratios=fractions, command=" ".join(["hawk-compile", *sys.argv[1:]]),
            progress=lambda now: status.update(now.text), **given,
        )  # fmt: skip
    text = as_markdown(head(found), tables(found))
    if markdown:
        console.print(text, soft_wrap=True)
    else:
        show(console, head(found), tables(found))
    if out is not None:
        console.print(f"written: {', '.join(map(str, found.write(out, text)))}")
