"""ONNX models by transformers' exporter, run by ONNX Runtime. Weights lie beside the graph as external data.

Wrapped, because the exporter of transformers 5.23 needs it:

- its rewrite of a stable sort makes a node without a value, which torch.onnx then misses: ONNX's TopK is stable by
  definition (the lower index wins), so the sort is translated to it directly.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawk_compile.compat.exporters import translated_sort
from hawk_compile.errors import ConfigError
from hawk_compile.exporting.components import DECODE, PREFILL, Component
from hawk_compile.exporting.quantize import METHODS, quantize
from hawk_compile.exporting.weights import locations, share_weights

PACKAGES: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
RUN_BY: tuple[str, ...] = ("onnxruntime",)
EXTRA = "onnx"
SETTINGS = ("quantization",)
DTYPES = ("float32", "float16")
"""Of weights and activations that ONNX Runtime has on a CPU."""
OPSET = 20


@dataclass(frozen=True)
class Options:
    """`quantization`: None, or 'int8' for int8 weights in prefill and decode (the encoder stays as it is)."""

    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, *METHODS):
            raise ConfigError(f"quantization must be one of {', '.join(METHODS)} or None, got {self.quantization!r}")


def options(settings: dict[str, Any]) -> Options:
    """This format's own settings, as `export` was given them."""
    return Options(settings.get("quantization"))


def write(component: Component, folder: Path, options: Options) -> tuple[list[str], dict[str, Any]]:
    """Write one component; returns the names of its files, the one to open first, and details for the manifest."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with stable_sort():
        program = component.program(OnnxExporter, OnnxConfig, opset_version=OPSET)
    name = f"{component.name}.onnx"
    OnnxExporter.save_program(program, folder / name)
    details = {}
    if options.quantization and component.name in (PREFILL, DECODE):
        quantize(folder / name)
        details["quantization"] = options.quantization
    first = folder / f"{PREFILL}.onnx"
    if component.name == DECODE and first.is_file():
        share_weights(first, folder / name)
    return [name, *locations(folder / name)], details


@contextlib.contextmanager
def stable_sort() -> Iterator[None]:
    """Let torch.onnx translate aten.sort.stable itself."""
    from onnxscript import onnx_opset

    op: Any = onnx_opset.opset18

    def sort(self: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Reshape(op.Gather(op.Shape(self), op.Constant(value_ints=[dim])), op.Constant(value_ints=[-1]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    with translated_sort(sort):
        yield


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
    taken = [each.name for each in session.get_inputs()]
    given = [each.name for each in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        results = session.run(None, {name: inputs[name].numpy() for name in taken})
        return {name: torch.from_numpy(result) for name, result in zip(given, results, strict=True)}

    return run
