"""`hawk-compile export`, `run` and `serve`: a model elsewhere than in a Python program of one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hawk_compile.tools.commands.common import (
    Checkpoint,
    Dtype,
    Ratio,
    Settings,
    console,
    settings_of,
    values_of,
)


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[str, typer.Option(help="onnx, aoti, openvino, tensorrt or executorch.")] = "onnx",
    ratio: Ratio = 0.8,
    dtype: Dtype = "fp32",
    quantization: Annotated[str | None, typer.Option(help="int8 weights in the decoder (onnx): int8.")] = None,
    size: Annotated[
        list[str], typer.Option(help="A size to build for, as prompt=16:512:2048 (tensorrt, executorch; repeatable).")
    ] = [],  # noqa: B006
    capability: Annotated[
        list[str], typer.Option(help="A GPU's compute capability to build for, as 8.9 (tensorrt; repeatable).")
    ] = [],  # noqa: B006
    more: Settings = [],  # noqa: B006
    check: Annotated[bool, typer.Option(help="Compare the result with PyTorch.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write a checkpoint with pruning inside its prefill, to run without PyTorch."""
    from hawk_compile.tools.export_commands import export_checkpoint, sizes_of

    own = {"quantization": quantization, "sizes": sizes_of(size), "compute_capabilities": capability}
    settings: dict[str, Any] = {"format": format, "ratio": ratio}
    settings |= {name: value for name, value in own.items() if value} | settings_of(more)
    export_checkpoint(console(), checkpoint, out, dtype=dtype, check=check, overwrite=overwrite, **settings)


def run(
    folder: Annotated[Path, typer.Argument(help="A folder that export wrote.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path], typer.Option(help="A picture; may be given several times.")] = [],  # noqa: B006
    ratio: Annotated[float | None, typer.Option(help="Fraction of visual tokens removed; else the export's.")] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
) -> None:
    """Ask an exported model."""
    from hawk_compile.tools.export_commands import run_export

    run_export(console(), folder, image, question, ratio=ratio, tokens=tokens)


def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, or a Hub repository.")],
    ratio: Ratio = 0.8,
    more: Annotated[
        list[str],
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting, such as selector=divprune (repeatable)."),
    ] = [],  # noqa: B006
    show: Annotated[bool, typer.Option("--print", help="Print vLLM's command, and do not run it.")] = False,
) -> None:
    """Serve a checkpoint in vLLM, pruned; vLLM's own arguments may follow."""
    from hawk_compile.tools.serve import serve as run_server

    run_server(typer.echo, checkpoint, {"ratio": ratio, **values_of(more)}, context.args, run=not show)
