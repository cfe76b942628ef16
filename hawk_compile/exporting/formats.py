"""The formats: which there are, and what one needs.

A format is a module of its own name, with

    PACKAGES, RUN_BY  distributions that writing a folder and running one need; EXTRA, the extra that installs them
    write             a component into a folder -> names of its files, the one to open first, and details
    open_session      a component's file -> a function of tensors by name
    DTYPES            where not every dtype can be run
    SETTINGS, options settings of `export` that are its own, and what it makes of them
    PORTABLE          False where graphs may hold our own operators
"""

import importlib
import importlib.metadata
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.errors import ExportError

FORMATS = ("onnx", "aoti", "openvino", "tensorrt", "executorch")


def target_of(format: str, to_write: bool) -> Any:
    """The module of a format, whose packages are installed: `PACKAGES` to write a folder, `RUN_BY` to run one.

    Raises:
        ExportError: an unknown format, or a package that is missing.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    for package in target.PACKAGES if to_write else target.RUN_BY:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ExportError(
                f'format="{format}" needs the package {package}, which is not installed: pip install '
                f'"hawk-compile[{target.EXTRA}]"'
            ) from None
    return target


def check_dtype(model: PreTrainedModel, target: Any, format: str) -> None:
    """Refuse a model in a dtype that the format's runtime does not have."""
    dtype = str(model.dtype).removeprefix("torch.")
    if hasattr(target, "DTYPES") and dtype not in target.DTYPES:
        raise ExportError(
            f'format="{format}" runs models in {" or ".join(target.DTYPES)}, got one in {dtype}: give model.float(), '
            'or load it with dtype="float32" (on the command line --dtype fp32)'
        )
