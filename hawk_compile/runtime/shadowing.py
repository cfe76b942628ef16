"""Putting the overrides on a model and taking them off again, among what others put on the same names.

Others hook themselves around our forward, which goes on working, or put an old forward over it, after which nothing is
pruned. So what is ours can always be told from what is not.
"""

import contextlib
import functools
import types
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hawk_compile.compat.accelerate import FORWARD, hooked_module
from hawk_compile.runtime.originals import made
from hawk_compile.runtime.overrides import attribute_of, overrides_of
from hawk_compile.runtime.split import put_hooks_back
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.within_generate import PREPARE_INPUTS

WRAPPED_OFTEN = ("generate", "save_pretrained", PREPARE_INPUTS)
"""Public methods that others replace by their own on purpose; pruning does not need ours."""

MOST_WRAPPERS = 1000
"""Callables that are looked at for ours, at most."""


def install(model: PreTrainedModel, originals: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put the overrides on a model; what others wrapped around them stays.

    Args:
        originals: what lay there before an earlier call of `optimize`, by name; empty if there was none.

    Returns:
        What lay there before, and the names where something of others had replaced an earlier override.
    """
    earlier = RUNTIME in model.__dict__
    replaced = []
    kept = dict(originals)
    for name, (owner, method) in overrides_of(model).items():
        attribute = attribute_of(name)
        there = owner.__dict__.get(attribute)
        if there is not None and reaches(there, method.__func__):
            continue
        if name == PREPARE_INPUTS and there is not None:
            continue  # its arguments are asked for; what is not seen of it, see `Generation.tells`
        if hooked_module(there) is owner:  # beneath the hooks, which see inputs first; their removal leaves ours
            attribute = FORWARD
            there = owner.__dict__[FORWARD]
        if earlier:
            replaced.append(name)
        kept.pop(name, None)
        if there is not None:
            kept[name] = there
        owner.__dict__[attribute] = method
    return kept, replaced


def uninstall(model: PreTrainedModel, originals: dict[str, Any]) -> None:
    """Take the overrides off; what others put over them since stays where it is."""
    put_hooks_back(model)
    for name, (owner, method) in overrides_of(model).items():
        attribute = attribute_of(name)
        there = owner.__dict__.get(attribute)
        if hooked_module(there) is owner:
            attribute = FORWARD
            there = owner.__dict__[FORWARD]
        while isinstance(there, types.MethodType):  # accelerate binds a bound method once more when it unwraps a model
            there = there.__func__
        if there is not method.__func__ and there not in made:
            continue
        if name in originals:
            owner.__dict__[attribute] = originals[name]
        elif attribute == FORWARD:
            owner.__dict__[attribute] = getattr(type(owner), name).__get__(owner)
        else:
            del owner.__dict__[attribute]


def replaced_overrides(model: PreTrainedModel) -> list[str]:
    """Names where something of others has replaced what `optimize` put there, and does not call it."""
    return [
        name for name, (owner, method) in overrides_of(model).items()
        if name not in WRAPPED_OFTEN and not reaches(owner.__dict__.get(attribute_of(name)), method.__func__)
    ]  # fmt: skip


def reaches(callable_: Any, function: Any) -> bool:
    """Whether something is a function or wraps it: as a method, a partial, a closure or an object."""
    waiting: list[Any] = [callable_]
    seen: set[int] = set()
    while waiting and len(seen) < MOST_WRAPPERS:
        current = waiting.pop()
        if current is function or (isinstance(current, types.FunctionType) and alike(current, function)):
            return True
        if id(current) not in seen and callable(current) and not isinstance(current, (type, nn.Module)):
            seen.add(id(current))
            waiting += wrapped_by(current)
    return False


def alike(current: types.FunctionType, function: Any) -> bool:
    """Whether both are ours for one name, of a class and of the one that the model had before."""
    return current.__name__ == function.__name__ and current in made and function in made


def wrapped_by(wrapper: Any) -> list[Any]:
    """What a callable may call. Only what it holds is looked at: some objects make up any attribute one asks for."""
    if isinstance(wrapper, types.MethodType):
        return [wrapper.__func__]
    if (hooked := hooked_module(wrapper)) is not None:  # what it is said to wrap is what lay there at first
        return [vars(hooked).get(FORWARD)]
    held = list(getattr(wrapper, "__dict__", {}).values())
    if isinstance(wrapper, functools.partial):
        held += [wrapper.func, *wrapper.args, *wrapper.keywords.values()]
    for cell in getattr(wrapper, "__closure__", None) or () if isinstance(wrapper, types.FunctionType) else ():
        with contextlib.suppress(ValueError):  # of a cell that is empty
            held.append(cell.cell_contents)
    return held
