"""A training that was stopped, as a folder from which it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Weights, optimizer state and counters as one folder that appears whole or not at all."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, values in optimizer.state.items():
        tensors |= {f"{key}.{names[parameter]}": value for key, value in values.items()}
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, new / "state.safetensors")
    (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Undo `save_state`; a folder that was about to take the last one's place counts too."""
    new = folder.with_name(folder.name + ".new")
    source = folder if folder.exists() else new
    tensors = load_file(source / "state.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        if f"step.{name}" in tensors:
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return json.loads((source / "state.json").read_text(encoding="utf-8"))
