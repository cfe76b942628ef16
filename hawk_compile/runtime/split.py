"""Models that others have split: placed on several devices or offloaded by accelerate's hooks, sharded by FSDP.

What stands in the prefill's graph, the text decoder with its embeddings and its head, must be held whole by one device:
a hook that fetches weights in the middle of it cannot be captured. An encoder runs in front of the graph, with its
hooks. Those of the decoder have nothing to do then but to move inputs, which is done once for all of them ahead of the
graph: in captured code the modules run without them, elsewhere with them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hawk_compile.capture.inside import graph_modules, shards
from hawk_compile.capture.modalities import raw_inputs
from hawk_compile.capture.patches import is_captured
from hawk_compile.compat.accelerate import (
    FORWARD,
    HOOK,
    brings_weights,
    device_of_hook,
    hooked_module,
    hooks_on,
    only_places,
)
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.runtime.state import RUNTIME, Runtime
from hawk_compile.settings.config import HawkConfig

WHOLE = (
    "The text decoder, its embeddings and its head must be held whole by one device, with their weights there while "
    "they run; encoders may be elsewhere"
)
REMEDY = (
    'load it with such a device_map ({"": 0}, or the decoder on one device and the encoder on another or offloaded), '
    'quantise it to fit, or share its heads between processes (tp_plan="auto"); hawk_compile.restore(model) runs it '
    "unpruned"
)
SHARDING = (
    'call fully_shard on the whole model alone, so that it is gathered before its forward, or load it with '
    'tp_plan="auto"; hawk_compile.restore(model) runs it unpruned'
)


def check_split(model: PreTrainedModel, config: HawkConfig) -> None:
    """Refuse a model whose decoder is not held whole by one device.

    Raises:
        UnsupportedModelError: names a module, and where it is.
    """
    parts = [*graph_modules(model)]
    for path, part in parts:
        if isinstance(part, shards()):
            raise UnsupportedModelError(
                f"model.{path} is sharded by FSDP, which gathers its weights in the middle of the prefill's graph. "
                f"{WHOLE}: {SHARDING}"
            )
    if not any(HOOK in vars(part) for part in model.modules()):
        return
    device = device_of_graph(model)
    hooks = [(path, hook) for path, part in parts for hook in hooks_on(part)]
    if offloaded := next((path for path, hook in hooks if brings_weights(hook)), None):
        raise UnsupportedModelError(
            f"model.{offloaded} is offloaded (cpu_offload, disk_offload, or a device_map that leaves it on another "
            f"device than it runs on). {WHOLE}: {REMEDY}"
        )
    for path, hook in hooks:
        if not stays(hook, device):
            raise UnsupportedModelError(
                f"model.{path} runs on {device_of_hook(hook)} by a hook of accelerate's (device_map), and the "
                f"decoder's embeddings are on {device}. {WHOLE}: {REMEDY}"
            )
    if config.compile_vision and any(HOOK in vars(part) for part in encoders(model)):
        raise UnsupportedModelError(
            "compile_vision: a hook of accelerate's (device_map, offload) places the encoder's weights or inputs, "
            "which a compiled encoder would not do: leave compile_vision out"
        )


def encoders(model: PreTrainedModel) -> Iterator[nn.Module]:
    inside = {id(part) for _, part in graph_modules(model)} | {id(model)}
    return (part for part in model.modules() if id(part) not in inside)


def device_of_graph(model: PreTrainedModel) -> torch.device:
    """Where the embeddings of ids are, and so the decoder."""
    embeddings: Any = model.get_input_embeddings()
    return next(embeddings.parameters()).device  # type: ignore[no-any-return]


def stays(hook: Any, device: torch.device) -> bool:
    """Whether a hook leaves what is on a device where it is."""
    target = device_of_hook(hook)
    if target is None:
        return True
    return target.type == device.type and (target.index is None or target.index == device.index)


def adapt(model: PreTrainedModel, runtime: Runtime) -> bool:
    """Let captured code run without the decoder's hooks, and note where its inputs belong.

    Returns:
        Whether a module was changed.

    Raises:
        UnsupportedModelError: see `check_split`.
    """
    check_split(model, runtime.config)
    runtime.hook = vars(model).get(HOOK)
    hooked = [part for _, part in graph_modules(model) if hooks_on(part)]
    runtime.device = device_of_graph(model) if hooked or runtime.hook is not None else None
    changed = False
    for part in hooked:
        if all(map(only_places, hooks_on(part))) and hooked_module(vars(part).get("forward")) is part:
            vars(part)["forward"] = functools.partial(unhooked_in_captures, part, vars(part)["forward"])
            changed = True
    return changed


def unhooked_in_captures(module: nn.Module, hooked: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose hooks have nothing to do in captured code."""
    return (vars(module)[FORWARD] if is_captured() else hooked)(*args, **kwargs)


def put_hooks_back(model: PreTrainedModel) -> None:
    """Undo `adapt`."""
    for part in model.modules():
        forward = vars(part).get("forward")
        if isinstance(forward, functools.partial) and forward.func is unhooked_in_captures:
            vars(part)["forward"] = forward.args[1]


def placed(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call where the decoder is, but for what an encoder takes, whose hooks see to that.

    Raises:
        UnsupportedModelError: hooks that came after `optimize`, by which the decoder is not whole any more.
    """
    runtime: Runtime = vars(model)[RUNTIME]
    if vars(model).get(HOOK) is not runtime.hook:
        adapt(model, runtime)
    if runtime.device is None:
        return kwargs
    raw = {name for names in raw_inputs(model).values() for name in names}
    return {
        name: value if name in raw or isinstance(value, Cache) else moved(value, runtime.device)
        for name, value in kwargs.items()
    }


def moved(value: Any, device: torch.device | None) -> Any:
    """A value, and all that it holds, on a device; as it is where that is None."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)({name: moved(held, device) for name, held in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(moved(held, device) for held in value)
    return value
