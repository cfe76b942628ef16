"""Private names of accelerate: how its hooks, which place a model's weights and inputs, lie on modules.

Accelerate is not imported here: its hooks are told by the module that their classes come from.
"""

import functools
from typing import Any

import torch
from torch import nn

HOOK = "_hf_hook"
"""The attribute of a module that holds its hook, or a chain of them (`hooks`)."""
FORWARD = "_old_forward"
"""The attribute of a module with a hook that holds the forward which the hook runs."""
ROOM = "accelerate.hooks"
"""The module whose code calls the hooks."""


def hooks_on(module: nn.Module) -> list[Any]:
    """The hooks of accelerate's on a module, in the order they are called."""
    waiting, hooks = [vars(module).get(HOOK)], []
    while waiting:
        hook = waiting.pop(0)
        chained = vars(hook).get("hooks") if hook is not None else None
        if chained is not None:
            waiting = [*chained, *waiting]
        elif hook is not None:
            hooks.append(hook)
    return hooks


def hooked_module(forward: Any) -> nn.Module | None:
    """The module whose hooks a forward calls, before and behind what lies under `FORWARD` there; None of others."""
    if not isinstance(forward, functools.partial) or getattr(forward.func, "__module__", "") != ROOM:
        return None
    return forward.args[0]  # type: ignore[no-any-return]


def brings_weights(hook: Any) -> bool:
    """Whether a hook puts weights on a module before its forward, and takes them off behind it."""
    return bool(getattr(hook, "offload", False))


def device_of_hook(hook: Any) -> torch.device | None:
    """Where a hook moves a module's inputs; None if nowhere."""
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device)


def only_places(hook: Any) -> bool:
    """Whether a hook does no more than to place inputs and outputs, and to bring weights."""
    return any(kind.__name__ == "AlignDevicesHook" and kind.__module__ == ROOM for kind in type(hook).__mro__)
