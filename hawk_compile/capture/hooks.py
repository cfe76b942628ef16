"""Hooks that users put on modules. A graph would call them while it is captured, on tensors without numbers and at the
prompt's full length, and never again. So where a graph has to be captured they are looked for; that one was added or
taken off is seen by the graph's guards.

What libraries put there (recorders of hidden states, observers of quantised layers, collectives of tensor-parallel
ones) is part of what the model computes, and is captured with it.
"""

import functools
from typing import Any

from hawk_compile.capture.inside import Named
from hawk_compile.compat.modes import global_hooks, hooks_of
from hawk_compile.errors import UnsupportedCallError

PART_OF_MODELS = (
    "torch", "transformers", "accelerate", "peft", "bitsandbytes", "compressed_tensors", "optimum", "torchao",
)  # fmt: skip
"""Packages whose hooks compute, and keep nothing for anybody outside of the model."""
REMEDY = (
    "take them off, ask for output_hidden_states=True to read what the layers give for the kept tokens, or "
    "hawk_compile.restore(model) to run it unpruned with its hooks"
)
MOST_NAMED = 3


def refuse_hooks(modules: Named, what: str, remedy: str = REMEDY) -> None:
    """Refuse to capture modules with hooks of users.

    Args:
        what: runs these modules inside a graph, in words.

    Raises:
        UnsupportedCallError: it names the modules and their hooks.
    """
    hooked = [(path, name_of(hook)) for path, module in modules for hook in hooks_of(module) if is_of_user(hook)]
    if hooked:
        more = f", and {len(hooked) - MOST_NAMED} more" if len(hooked) > MOST_NAMED else ""
        named = ", ".join(f"{name} of {path or 'the model'}" for path, name in hooked[:MOST_NAMED]) + more
        raise UnsupportedCallError(
            f"hooks stand on modules that {what} runs inside one compiled graph, which cannot call them ({named}): "
            f"{remedy}"
        )


def refuse_global_hooks() -> None:
    """Refuse hooks of users that torch calls for every module, those inside a graph among them.

    Raises:
        UnsupportedCallError: as said.
    """
    if named := [name_of(hook) for hook in global_hooks() if is_of_user(hook)]:
        raise UnsupportedCallError(
            f"hooks for every module are registered ({', '.join(named[:MOST_NAMED])}), and a pruned prefill runs its "
            f"modules inside one compiled graph, which cannot call them: {REMEDY}"
        )


def is_of_user(hook: Any) -> bool:
    return room_of(hook).partition(".")[0] not in PART_OF_MODELS


def name_of(hook: Any) -> str:
    """A hook's name and the module of code that it stands in."""
    function = unwrapped(hook)
    return f"{getattr(function, '__qualname__', type(function).__qualname__)} of {room_of(function)}"


def room_of(hook: Any) -> str:
    """The module of code that a hook stands in; code that was made from a text may have none."""
    return getattr(unwrapped(hook), "__module__", None) or "<unknown>"


def unwrapped(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook
