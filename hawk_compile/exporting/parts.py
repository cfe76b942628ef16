"""Components written in a format, as the manifest tells of them."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hawk_compile.capture.diagnosis import reason_of, shown
from hawk_compile.errors import ExportError, HawkError
from hawk_compile.exporting.caches import is_held, length_dim
from hawk_compile.exporting.components import DECODE, PREFILL, Component, Shape
from hawk_compile.exporting.folder import size_of
from hawk_compile.exporting.manifest import Part, TensorSpec, file_digest
from hawk_compile.exporting.quiet import quiet
from hawk_compile.progress import Listener, Progress


def write_parts(
    target: Any, components: Iterable[Component], folder: Path, options: Any, progress: Listener
) -> dict[str, Part]:
    """Write components one after another; returns what the manifest says of each, by its name."""
    parts: dict[str, Part] = {}
    for component in components:
        before = size_of(folder)
        part = parts[component.name] = write_part(target, component, folder, options)
        text = f"{component.name}: {(size_of(folder) - before) / 1e6:.1f} MB in {part.seconds} s"
        progress(Progress(len(parts), 0, text))
    return with_digests(parts, folder)


def write_part(target: Any, component: Component, folder: Path, options: Any) -> Part:
    """Write a component. The hashes of its files are left empty: later components may add to them."""
    started = time.perf_counter()
    try:
        with quiet():
            files, details = target.write(component, folder, options)
    except (HawkError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"{component.name} cannot be exported to {target.__name__.rsplit('.', 1)[-1]} ({type(error).__name__}: "
            f"{reason_of(error)}; TORCHDYNAMO_VERBOSE=1 shows all of it): export to another format, or run the model "
            "with hawk_compile.optimize"
        ) from shown(error)
    return Part(
        name=component.name,
        file=files[0],
        sha256=dict.fromkeys(files, ""),
        inputs=[spec(name, component.sample[name], shape) for name, shape in component.shapes.items()],
        outputs=[spec(name, value, output_shape(component, name, value)) for name, value in component.results.items()],
        least=component.least_sizes,
        seconds=round(time.perf_counter() - started, 1),
        details=details,
    )


def spec(name: str, value: Tensor, shape: Shape) -> TensorSpec:
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), list(shape))


def output_shape(component: Component, name: str, value: Tensor) -> Shape:
    if component.name in (PREFILL, DECODE):
        along = "total" if component.name == DECODE else "prompt" if name == "scores" else "kept"
        tokens = length_dim(name) if is_held(name) else None if name == "logits" else 1
        return tuple(
            "batch" if dim == 0 else along if dim == tokens else size for dim, size in enumerate(value.shape)
        )
    taken, shape = next(iter(component.shapes.items()))
    symbolic = next(dim for dim, size in enumerate(shape) if isinstance(size, str))
    rows = component.sample[taken].shape[symbolic]
    return tuple(
        "merged_patches" if dim == 0 and size != rows else shape[symbolic] if dim == 0 else size
        for dim, size in enumerate(value.shape)
    )


def with_digests(parts: dict[str, Part], folder: Path) -> dict[str, Part]:
    """The parts with the SHA-256 of their files, which they may share; each is read once."""
    found = {file: file_digest(folder / file) for file in {file for part in parts.values() for file in part.sha256}}
    return {name: replace(part, sha256={file: found[file] for file in part.sha256}) for name, part in parts.items()}
