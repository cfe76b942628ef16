"""Private ways of PEFT: what it puts on a model's modules for one call, and how it reads weights. It is not imported
here."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawk_compile.errors import CaptureError


def hooks_ever_put() -> int:
    """How many hooks of torch's were put on anything in this process so far: where it is the same, none is new."""
    return RemovableHandle.next_id


def argument_in_hooks(module: nn.Module) -> str | None:
    """The argument of a call that tells rows or tokens apart by adapter, if PEFT hands one to this module by a
    hook that it takes off behind the call; else None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, functools.partial) and str(getattr(hook.func, "__module__", "")).startswith("peft."):
            return next(iter(hook.keywords), "adapter_names")
    return None


def let_weights_be_read() -> None:
    """Let Dynamo follow how DoRA reads the weight that it norms, if PEFT is loaded."""
    read = getattr(sys.modules.get("peft.utils.integrations"), "dequantize_module_weight", None)
    if read is not None:
        stand_for(read)


@functools.cache
def stand_for(read: Callable[[nn.Module], Any]) -> None:
    """Of plain weights, in code that Dynamo traces: PEFT asks for the name of their class's module, which Dynamo cannot
    follow. It stays so for the process; quantised weights cannot be followed either way."""

    def plain_weight(module: nn.Module) -> Any:
        weight = module.weight
        if type(weight) is not nn.Parameter:
            raise CaptureError(
                "an adapter (DoRA) norms a quantised weight, which no graph can take: call merge_adapter(), or "
                "hawk_compile.restore(model)"
            )
        return weight

    torch.compiler.substitute_in_graph(read)(plain_weight)
