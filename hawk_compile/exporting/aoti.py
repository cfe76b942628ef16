"""AOTInductor packages (`.pt2`): compiled code and weights, loaded by torch without any Python of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawk_compile.exporting.components import Component

PACKAGES: tuple[str, ...] = ()
RUN_BY: tuple[str, ...] = PACKAGES
EXTRA = ""


def write(component: Component, folder: Path, options: Any) -> tuple[list[str], dict[str, Any]]:
    """Compile one component; returns the names of its files, the one to open first, and no details."""
    name = f"{component.name}.pt2"
    torch._inductor.aoti_compile_and_package(component.trace(), package_path=str(folder / name))
    return [name], {}


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    run = torch._inductor.aoti_load_package(str(folder / file))
    return lambda inputs: run(**inputs)
