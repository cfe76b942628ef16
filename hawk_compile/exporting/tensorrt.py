"""TensorRT engines for RTX GPUs, built on a machine without a GPU: one per component and compute capability.

They are built from the ONNX files, which stay in the folder: TensorRT's server edition, which builds on the GPU's own
machine, takes those, by the trtexec line that the manifest holds. Networks are strongly typed: weights and activations
have the model's dtype.
"""

import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import ConfigError, ExportError
from hawk_compile.exporting import onnx, profile
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.profile import Range

PACKAGES: tuple[str, ...] = ("onnx", "onnxscript", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs")
RUN_BY = PACKAGES[2:]
EXTRA = "tensorrt"
SETTINGS = ("sizes", "compute_capabilities")
CAPABILITIES = ("8.6", "8.9", "12.0")

HARMLESS = (
    # A reminder for callers of releases that knew no int64: our inputs and outputs are int64, and the manifest says so.
    re.compile(r"Make sure (input|output) \S+ has Int64 binding"),
    # Their length is the only thing that is read of these two, by design; they remain inputs of the engine.
    re.compile(r"Input Tensor (kept_slots|kept_visual_slots) is unused or used only at compile-time"),
)
"""Warnings of TensorRT that tell nothing about the engine; all others are written into the manifest."""

log = logging.getLogger("hawk_compile")


@dataclass(frozen=True)
class Options:
    """What `export` is told for this format.

    Attributes:
        sizes: (minimum, usual, maximum) by name, where the user gave them; see `profile.py`.
        capabilities: compute capabilities to build for, such as '8.9'.
    """

    sizes: dict[str, Range]
    capabilities: tuple[str, ...]

    @property
    def selection(self) -> str:
        """How the prefill selects: by a sort, as long as TensorRT can sort the longest prompt."""
        return "sort" if profile.known(self.sizes)["prompt"][2] <= profile.LONGEST_SORT else "threshold"


def options(settings: dict[str, Any]) -> Options:
    """This format's own settings, as `export` was given them.

    Raises:
        ConfigError: sizes that are none, or a compute capability that TensorRT cannot build for.
    """
    sizes = profile.checked(settings.get("sizes", {}))
    wanted = settings.get("compute_capabilities", CAPABILITIES)
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not wanted:
        raise ConfigError(f'compute_capabilities must be a list such as ["8.6", "8.9"], got {wanted!r}')
    known = capabilities()
    for capability in wanted:
        if capability not in known:
            raise ConfigError(
                f"compute_capabilities holds {capability!r}, and the TensorRT installed here builds for "
                f"{', '.join(known)}: give some of these"
            )
    return Options(sizes, tuple(dict.fromkeys(wanted)))


def capabilities() -> dict[str, Any]:
    """Compute capabilities that the installed TensorRT can build for, such as '8.9', and what it calls them."""
    import tensorrt_rtx_bindings as trt

    found = ((re.fullmatch(r"SM(\d+)(\d)", name), value) for name, value in trt.ComputeCapability.__members__.items())
    return {f"{name[1]}.{name[2]}": value for name, value in found if name}


def write(component: Component, folder: Path, options: Options) -> tuple[list[str], dict[str, Any]]:
    """Write one component; returns the names of its files, the one to open first, and details for the manifest.

    The details: `engines` (file, bytes and seconds by compute capability), `profile` (sizes by name), `trtexec`, and
    the `warnings` of TensorRT that matter.

    Raises:
        ExportError: TensorRT refuses the network.
    """
    files, _ = onnx.write(component, folder, onnx.Options())
    sizes = profile.ranges(component, options.sizes)
    shapes = profile.shapes(component, sizes)
    engines, warnings = build(component.name, folder, shapes, options.capabilities)
    for warning in warnings:
        log.warning("TensorRT on %s: %s", component.name, warning)
    details = {
        "engines": engines,
        "profile": {name: list(size) for name, size in sizes.items()},
        "trtexec": profile.trtexec(component.name, shapes),
        "warnings": warnings,
    }
    return [*files, *(engine["file"] for engine in engines.values())], details


def build(
    name: str, folder: Path, shapes: dict[str, list[tuple[int, ...]]], wanted: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Build `name`.onnx for each compute capability, with one optimisation profile; returns engines and warnings."""
    import tensorrt_rtx_bindings as trt

    messages = logger().messages
    messages.clear()
    builder = trt.Builder(logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger())
    if not parser.parse_from_file(str(folder / f"{name}.onnx")):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise ExportError(
            f"{name} cannot be exported to tensorrt, whose parser refuses "
            + "; ".join(f"node {each.node_name()} ({each.node_operator()}): {each.desc()}" for each in errors)
            + ': export with format="onnx" to run it by ONNX Runtime'
        )
    engines = {}
    for capability in wanted:
        started = time.perf_counter()
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(capabilities()[capability], 0)
        ranges = builder.create_optimization_profile()
        for given, (least, usual, most) in shapes.items():
            ranges.set_shape(given, least, usual, most)
        config.add_optimization_profile(ranges)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            errors = [text for severity, text in messages if severity < int(trt.ILogger.Severity.WARNING)]
            raise ExportError(
                f"{name} cannot be built by TensorRT for compute capability {capability}: "
                f"{'; '.join(errors) or 'no reason given'}. Give other compute_capabilities or sizes, or "
                'format="onnx"'
            )
        file = f"{name}.sm{capability.replace('.', '')}.engine"
        (folder / file).write_bytes(engine)
        seconds = round(time.perf_counter() - started, 2)
        engines[capability] = {"file": file, "bytes": engine.nbytes, "seconds": seconds}
    texts = dict.fromkeys(text for _, text in messages)
    return engines, [text for text in texts if not any(pattern.search(text) for pattern in HARMLESS)]


@functools.cache
def logger() -> Any:
    """The one logger of this process, since TensorRT keeps the first and ignores others; it holds what went wrong."""
    import tensorrt_rtx_bindings as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.messages.append((int(severity), message))

    return Logger()


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Run the engine of this machine's GPU. Tensors go to the GPU and come back at every call.

    Raises:
        ExportError: no GPU, or none that an engine was built for.
    """
    path = folder / engine_for(part)["file"]
    import tensorrt_rtx_bindings as trt

    runtime = trt.Runtime(logger())
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot open {path}: {logger().messages[-1:]}; export again")
    context = engine.create_execution_context()
    running = threading.Lock()  # a context holds the shapes and addresses of one call
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    taken = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    made = {each.name: getattr(torch, each.dtype) for each in part.outputs}
    nothing = torch.zeros(1, device="cuda")

    def bind(name: str, tensor: Tensor) -> None:
        # TensorRT wants an address even where there is nothing, as in a cache without tokens.
        context.set_tensor_address(name, tensor.data_ptr() or nothing.data_ptr())

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        profile.check_sizes(part, inputs)
        with running:
            return execute(inputs)

    def execute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: inputs[name].to("cuda").contiguous() for name in taken}
        for name, tensor in given.items():
            context.set_input_shape(name, tuple(tensor.shape))
            bind(name, tensor)
        results = {
            name: torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            for name, dtype in made.items()
        }
        for name, tensor in results.items():
            bind(name, tensor)
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(
                f"TensorRT could not run {part.name}: {logger().messages[-1:]}. Export again on this machine, or with "
                'format="onnx"'
            )
        return {name: tensor.cpu() for name, tensor in results.items()}

    return run


def engine_for(part: Any) -> dict[str, Any]:
    """The engine of a component for this machine's GPU.

    Raises:
        ExportError: no GPU, or none that an engine was built for.
    """
    engines = part.details["engines"]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if f"{major}.{minor}" in engines:
            return engines[f"{major}.{minor}"]
        found = f"this one has {major}.{minor}"
    else:
        found = "torch finds none here"
    raise ExportError(
        f"{part.name} was built for GPUs of compute capability {', '.join(engines)}, and {found}: load it on such a "
        'machine, export again with its compute_capabilities, or with format="onnx" for a CPU'
    )
