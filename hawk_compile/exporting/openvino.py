"""OpenVINO IR by transformers' exporter, run on the CPU.

Prefill and decode hold the same decoder: what both need lies in the prefill's weights, and the decode step's graph is
opened with that file, which OpenVINO maps into memory once.
"""

import hashlib
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import ExportError
from hawk_compile.exporting.components import DECODE, PREFILL, Component

PACKAGES: tuple[str, ...] = ("openvino",)
RUN_BY: tuple[str, ...] = PACKAGES
EXTRA = "openvino"
DTYPES = ("float32", "float16")
"""Of tensors that can be handed to OpenVINO from Python: numpy has no bfloat16."""
ALIGNMENT = 64
"""Bytes; OpenVINO's own writer aligns no less."""


def write(component: Component, folder: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Write one component; returns the names of its files, the one to open first, and no details."""
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    try:
        program = component.program(OpenVINOExporter, OpenVINOConfig, stateful=False, compress_to_fp16=False)
    except Exception as error:
        if not (operators := unconverted(str(error))):
            raise
        raise ExportError(
            f"{component.name} cannot be exported to openvino, which cannot convert {' and '.join(operators)}: export "
            "to another format, or run the model with hawk_compile.optimize"
        ) from error
    name = f"{component.name}.xml"
    OpenVINOExporter.save_program(program, folder / name)
    first = folder / f"{PREFILL}.xml"
    if component.name == DECODE and first.is_file():
        share_weights(first, folder / name)
        return [name, f"{PREFILL}.bin"], {}
    return [name, f"{component.name}.bin"], {}


def unconverted(log: str) -> list[str]:
    """The operators that OpenVINO's report, of a page or more, says that it has not converted."""
    summary = re.search(r"Conversion is failed for: (.*)", log)
    named = re.sub(r"<built-in function (\w+)>", r"\1", summary[1]).split(", ") if summary else []
    return [f"`{each.strip()}`" for each in named]


def share_weights(first: Path, second: Path) -> None:
    """Let the second graph read the first one's file, to which what it lacks is added; its own file goes."""
    held = {key: place.get("offset") for place, key, _ in constants(ElementTree.parse(first), first)}
    graph = ElementTree.parse(second)
    with first.with_suffix(".bin").open("ab") as file:
        for place, key, content in constants(graph, second):
            if key not in held:
                file.write(bytes(-file.tell() % ALIGNMENT))
                held[key] = str(file.tell())
                file.write(content)
            place.set("offset", str(held[key]))
    graph.write(second, encoding="utf-8", xml_declaration=True)
    second.with_suffix(".bin").unlink()


def constants(
    graph: "ElementTree.ElementTree[ElementTree.Element[str]]", path: Path
) -> Iterator[tuple["ElementTree.Element[str]", bytes, bytes]]:
    """Where each constant of a graph is placed in its file, what tells its bytes from others, and the bytes."""
    with path.with_suffix(".bin").open("rb") as file:
        for place in graph.iterfind(".//layer[@type='Const']/data"):
            file.seek(int(place.get("offset", 0)))
            content = file.read(int(place.get("size", 0)))
            yield place, hashlib.sha256(content).digest(), content


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    import openvino

    (weights,) = (name for name in part.sha256 if name.endswith(".bin"))  # ValueError: `load` says of which part
    core = openvino.Core()
    graph = core.read_model(str(folder / file), str(folder / weights))
    model = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    taken = {name: port for port in model.inputs for name in port.get_names()}
    given = {name: port for port in model.outputs for name in port.get_names()}

    local = threading.local()

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not hasattr(local, "request"):  # a request serves one call at a time
            local.request = model.create_infer_request()
        results = local.request.infer({port: inputs[name].numpy() for name, port in taken.items() if name in inputs})
        return {name: torch.from_numpy(results[port].copy()) for name, port in given.items()}

    return run
