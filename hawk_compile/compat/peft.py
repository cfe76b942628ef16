"""Private ways of PEFT: what it puts on a model's modules for one call. PEFT is not imported here."""

import functools

from torch import nn
from torch.utils.hooks import RemovableHandle


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
