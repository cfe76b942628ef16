"""The models that are timed: random weights made on the device, or a checkpoint; and twins that share their weights."""

import copy
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hawk_compile.errors import InputError
from hawk_compile.tools.benchmarking.memory import is_out_of_memory
from hawk_compile.tools.benchmarking.profiles import profile
from hawk_compile.tools.checkpoints import read_model
from hawk_compile.tools.inspection.without_weights import META, keep_layers

STANDARD_DEVIATION = 0.02
"""Of random weights: small enough for the logits of a deep decoder to stay finite in fp16."""

NOISE = 1_048_583
"""Random numbers that are drawn; a prime, so that repeated they fall elsewhere in each row of a matrix."""

Module = TypeVar("Module", bound=nn.Module)


def load(
    source: str | os.PathLike[str] | PreTrainedConfig, device: torch.device, dtype: torch.dtype, layers: int | None,
    scoring_only: bool,
) -> tuple[Any, int]:  # fmt: skip
    """(model in eval mode with `layers` decoder layers, how many it has uncut).

    Args:
        source: a profile's name, a checkpoint folder, or a config.
        layers: the first so many of the decoder; None for all.
        scoring_only: leave all of a random model but what the score reads on the meta device.

    Raises:
        InputError: an unknown profile, a folder that is no checkpoint, or weights that do not fit into memory.
        UnsupportedModelError: a checkpoint of another kind.
    """
    torch.manual_seed(0)
    try:
        if isinstance(source, os.PathLike) or (isinstance(source, str) and Path(source).is_dir()):
            return from_checkpoint(Path(source), device, dtype, layers)
        config = profile(source) if isinstance(source, str) else source
        text = config.get_text_config()
        total = text.num_hidden_layers
        cut(text, layers)
        return randomised(config, device, dtype, scoring_only), total
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"the weights of {source} do not fit into the memory of {device}: give fewer layers, a smaller dtype "
            "or another profile"
        ) from None


def from_checkpoint(
    folder: Path, device: torch.device, dtype: torch.dtype, layers: int | None
) -> tuple[PreTrainedModel, int]:
    model = read_model(folder, dtype)
    model.set_attn_implementation("sdpa")
    text = model.config.get_text_config()
    total = text.num_hidden_layers
    keep_layers(model, layers or total, total)
    cut(text, layers)
    return model.to(device), total  # type: ignore[arg-type]


def cut(text: Any, layers: int | None) -> None:
    """Let a decoder's config have no more than so many layers."""
    text.num_hidden_layers = min(layers or text.num_hidden_layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]


def randomised(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, scoring_only: bool) -> Any:
    """A model of random weights, made where and as they are used; computed buffers are as they must be."""
    with no_init_weights(), META if scoring_only else device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if scoring_only:
        layer = model.get_decoder().layers[0]
        for part in (layer.input_layernorm, layer.self_attn):
            part.to_empty(device=device)
    model.generation_config.eos_token_id = getattr(config.get_text_config(), "eos_token_id", None)
    with torch.no_grad():
        noise = torch.randn(NOISE, device=device, dtype=dtype) * STANDARD_DEVIATION
        for name, parameter in model.named_parameters():
            if parameter.device != META:
                fill(name, parameter, noise)
    return model.eval()


def fill(name: str, parameter: nn.Parameter, noise: Tensor) -> None:
    """Norms' weights (vectors) are about 1, everything else about 0: the noise over and over, which is soon copied."""
    for part in parameter.view(-1).split(len(noise)):
        part.copy_(noise[: len(part)])
    if parameter.ndim == 1 and not name.endswith("bias"):
        parameter.add_(1.0)


def twin(module: Module) -> Module:
    """Another set of modules over the same parameters and buffers."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(each): each for each in shared})
