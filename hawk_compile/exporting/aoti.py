"""AOTInductor packages (`.pt2`): compiled code, loaded by torch without any Python of the model.

On a CPU weights lie beside the code in safetensors, mapped into memory. Prefill and decode hold the same decoder:
what both need lies in the prefill's file alone. On other devices each package holds its own.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawk_compile.compat.dynamo import open_package, write_package
from hawk_compile.exporting.components import PREFILL, Component

PACKAGES: tuple[str, ...] = ()
RUN_BY: tuple[str, ...] = PACKAGES
EXTRA = ""
PORTABLE = False
"""Code that torch runs may hold our own operators."""


def write(component: Component, folder: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Compile one component; returns the names of its files, the one to open first, and details for the manifest.

    The details: `weights`, by file the compiled code's names of its constants and the file's names of them.
    """
    program = component.trace()
    name = f"{component.name}.pt2"
    path = str(folder / name)
    apart = all(value.device.type == "cpu" for value in component.sample.values())
    settings = {"aot_inductor.package_constants_in_so": not apart}
    write_package(program, path, settings)
    if not apart:
        return [name], {"weights": {}}
    values = {**program.state_dict, **program.constants}
    wanted = open_package(path).get_constant_fqns()
    weights = save_weights({each: values[each].detach() for each in wanted}, folder, component.name)
    return [name, *weights], {"weights": weights}


def save_weights(values: dict[str, Tensor], folder: Path, component: str) -> dict[str, dict[str, str]]:
    """Write what the prefill's file does not hold yet; returns, by file, whose names the values have there."""
    own, first = f"{component}.safetensors", folder / f"{PREFILL}.safetensors"
    held = {content_key(value): name for name, value in load_file(first).items()} if first.is_file() else {}
    fresh: dict[str, Tensor] = {}
    names: dict[str, dict[str, str]] = {first.name: {}, own: {}}
    for name, value in values.items():
        value = value.contiguous()
        key = content_key(value)
        if key in held:
            names[first.name][name] = held[key]
        else:
            fresh[name], names[own][name] = value.clone(), name
    if fresh:
        save_file(fresh, folder / own)
    return {file: taken for file, taken in names.items() if taken}


def content_key(value: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What tells a tensor from others."""
    return value.dtype, value.shape, hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).digest()


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    run = open_package(str(folder / file))
    values: dict[str, Tensor] = {}
    for name, taken in part.details["weights"].items():
        held = load_file(folder / name)
        values |= {constant: held[key] for constant, key in taken.items()}
    if values:
        run.load_constants(values, check_full_update=True, user_managed=True)

    def call(inputs: dict[str, Tensor], values: Any = values) -> dict[str, Tensor]:  # the code does not hold them
        return run(**inputs)

    return call
