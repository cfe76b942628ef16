"""What a call may leave nothing in: context variables, thread-locals, locks, attributes of the model."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

LOCKS = (type(threading.Lock()), type(threading.RLock()))


def globals_of_ours() -> Iterator[tuple[str, Any]]:
    """Every global of the package's modules, by module and name; what several import, once."""
    seen: set[int] = set()
    for module in [*sys.modules.values()]:
        if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] == "hawk_compile":
            for name, value in [*vars(module).items()]:
                if id(value) not in seen:
                    seen.add(id(value))
                    yield f"{module.__name__}.{name}", value


def locks(model: Any) -> dict[str, Any]:
    """Every lock of the package and of what an optimised model carries, by where it lies."""
    found = {name: value for name, value in globals_of_ours() if isinstance(value, LOCKS)}
    for name, value in globals_of_ours():
        if name.endswith(".LOCKS"):  # of each model's body
            bodies = enumerate([*value.items()])
            found |= {f"{name}[{type(body).__name__} {number}]": lock for number, (body, lock) in bodies}
    for holder in holders(model):
        found |= {f"{type(holder).__name__}.{name}": v for name, v in vars(holder).items() if isinstance(v, LOCKS)}
    return found


def holders(model: Any) -> tuple[Any, ...]:
    """What an optimised model carries, or the package's modules, that may hold locks of its own."""
    runtime = model.__dict__.get("_hawk_runtime")
    carried = () if runtime is None else (
        runtime, runtime.prefill, runtime.prefill.function, runtime.vision, *filter(None, [runtime.images])
    )
    kept = (value for _, value in globals_of_ours() if type(value).__module__.partition(".")[0] == "hawk_compile")
    return (*carried, *(value for value in kept if hasattr(value, "__dict__") and not isinstance(value, type)))


def held(model: Any) -> list[str]:
    """The locks that some thread holds, where none should: asked from a thread of its own, since some may be taken
    again by who has them."""
    found: list[str] = []

    def ask() -> None:
        for name, lock in locks(model).items():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                found.append(name)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return found


def held_here(model: Any) -> list[str]:
    """The locks that this very thread holds, of those that know who does."""
    return [name for name, lock in locks(model).items() if getattr(lock, "_is_owned", bool)()]


def left_in_thread(model: Any) -> list[str]:
    """What this thread's calls have left in context variables and thread-locals: each is empty outside of a call."""
    places = [*globals_of_ours()]
    runtime = model.__dict__.get("_hawk_runtime")
    places += [] if runtime is None else [("Runtime.asked", runtime.asked)]
    found = [f"{name} = {value.get(None)!r}"[:200] for name, value in places
             if isinstance(value, ContextVar) and value.get(None)]  # fmt: skip
    for name, value in places:
        if isinstance(value, threading.local):
            found += [f"{name}.{key} = {each!r}"[:200] for key, each in vars(value).items() if each]
    return found


def attributes(model: nn.Module) -> dict[str, Any]:
    """Which attributes every module has of its own, and what the model's runtime shadows."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}
