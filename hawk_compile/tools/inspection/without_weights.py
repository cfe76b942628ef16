"""Models on the meta device: nothing is allocated and nothing is computed, so a configuration file is enough."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from hawk_compile.compat.models import set_attention
from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.runtime.api import restore
from hawk_compile.tools.absent import reason_of, remedy

META = torch.device("meta")


def on_meta(source: Any) -> PreTrainedModel:
    """The model on the meta device, in eval mode and not optimised."""
    if isinstance(source, PreTrainedModel):
        held = [*source.parameters(), *source.buffers()]
        # A deep copy takes what its memo holds instead of copying it: the twin shares no tensor and allocates none.
        memo: dict[int, Any] = {id(each): meta_like(each) for each in held}
        return restore(copy.deepcopy(source, memo)).eval()
    generation = None
    if isinstance(source, (str, os.PathLike)):
        generation = generation_config(Path(source))
        source = read_config(Path(source))
    if not isinstance(source, PreTrainedConfig):
        raise InputError(f"give a checkpoint folder, a config.json, a config or a model, got {type(source).__name__}")
    source = copy.deepcopy(source)
    set_attention(source, None)  # one that is asked for may not be installed, and prefills are captured without it
    dtype = getattr(source, "dtype", None) or torch.float32
    try:
        with META:
            model = AutoModelForMultimodalLM.from_config(source, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{type(source).__name__} ({source.model_type}) makes no model of text and images or audio here: "
            f"{reason_of(error)}"
        ) from error
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def meta_like(held: Tensor) -> Tensor:
    twin = torch.empty_like(held, device=META)
    return nn.Parameter(twin, requires_grad=False) if isinstance(held, nn.Parameter) else twin


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a folder or file on this machine; nothing is downloaded."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no file {file}: {remedy(path)}, or a config.json")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is no model config: {reason_of(error)}") from error


def generation_config(path: Path) -> GenerationConfig | None:
    folder = path if path.is_dir() else path.parent
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None


def keep_layers(model: PreTrainedModel, wanted: int, total: int) -> int:
    """Cut the decoder's layers down to the first ones; returns how many are left."""
    stack = getattr(model.get_decoder(), "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != total or wanted >= total:
        return total
    del stack[wanted:]
    return wanted
