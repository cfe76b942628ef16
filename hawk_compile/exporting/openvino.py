"""OpenVINO IR by transformers' exporter, run on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawk_compile.exporting.components import Component

PACKAGES: tuple[str, ...] = ("openvino",)
RUN_BY: tuple[str, ...] = PACKAGES
EXTRA = "openvino"
DTYPES = ("float32", "float16")
"""Of tensors that can be handed to OpenVINO from Python: numpy has no bfloat16."""


def write(component: Component, folder: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Write one component; returns the names of its files, the one to open first, and no details."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    program = component.program(OpenVINOExporter, OpenVINOConfig, stateful=False, compress_to_fp16=False)
    name = f"{component.name}.xml"
    OpenVINOExporter.save_program(program, folder / name)
    return [name, f"{component.name}.bin"], {}


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    import openvino

    model = openvino.Core().compile_model(str(folder / file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    taken = {name: port for port in model.inputs for name in port.get_names()}
    given = {name: port for port in model.outputs for name in port.get_names()}

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        results = model({port: inputs[name].numpy() for name, port in taken.items() if name in inputs})
        return {name: torch.from_numpy(results[port].copy()) for name, port in given.items()}

    return run
