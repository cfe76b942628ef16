"""Models without weights: nothing is allocated and nothing is computed, so a configuration file is enough.

On the meta device they are built and their work is counted. What is captured of them is on the CPU, as it is of a
model that runs: some of its operators take no meta tensors beside numbers. One element stands for all of a weight.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from hawk_compile.compat.models import set_attention
from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.exporting.plain_weights import is_plain
from hawk_compile.runtime.api import restore
from hawk_compile.tools.absent import reason_of, remedy

META, HERE = torch.device("meta"), torch.device("cpu")


def on_meta(source: Any) -> PreTrainedModel:
    """The model on the meta device, in eval mode and not optimised; of a quantised one, that of its configuration:
    quantised weights have no shape that the passes ask for."""
    generation = None
    if isinstance(source, PreTrainedModel):
        if all(map(is_plain, source.parameters())):
            return restore(twin(source, lambda held: torch.empty_like(held, device=META))).eval()
        generation, source = source.generation_config, source.config
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
            f"{reason_of(error)}. Give another one, or install the transformers that has it"
        ) from error
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the CPU, each weight a view of one element; buffers are whole: forwards may write in them."""

    def like(held: Tensor) -> Tensor:
        if isinstance(held, nn.Parameter):
            return torch.empty((), dtype=held.dtype, device=HERE).expand(held.shape)
        return torch.zeros(held.shape, dtype=held.dtype, device=HERE)

    return twin(model, like)


def twin(model: PreTrainedModel, like: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy of a model that holds other tensors, of the same shapes."""
    # A deep copy takes what its memo holds instead of copying it: the twin shares no tensor.
    memo: dict[int, Any] = {}
    attributes = (value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor))
    for held in (*model.parameters(), *model.buffers(), *attributes):
        made = like(held)
        memo[id(held)] = nn.Parameter(made, requires_grad=False) if isinstance(held, nn.Parameter) else made
    return copy.deepcopy(model, memo)


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a folder or file on this machine; nothing is downloaded."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no file {file}: {remedy(path)}, or a config.json")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is no model config ({reason_of(error)}): give a checkpoint's config.json") from error


def generation_config(path: Path) -> GenerationConfig | None:
    folder = path if path.is_dir() else path.parent
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def keep_layers(model: PreTrainedModel, wanted: int, total: int) -> int:
    """Cut the decoder's layers down to the first ones; returns how many are left."""
    stack = getattr(model.get_decoder(), "layers", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) != total or wanted >= total:
        return total
    del stack[wanted:]
    return wanted
