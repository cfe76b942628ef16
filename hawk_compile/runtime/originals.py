"""What lies beneath the methods that an optimised model shadows, and looks like theirs."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.runtime.state import RUNTIME


def original(model: PreTrainedModel, name: str) -> Any:
    """A method of the model as it is without `optimize`."""
    runtime = model.__dict__.get(RUNTIME)
    if runtime is not None and name in runtime.originals:
        return runtime.originals[name]
    return getattr(type(model), name).__get__(model)


made: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()
"""What `looks_like` has made: a model whose class was changed since has that of its class before."""


def looks_like(function: Callable[..., Any], shadowed: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the name, the text and the signature of the method that it shadows.

    It gets no `__wrapped__`: whoever unwraps a model would follow it past us, and nothing would be pruned.
    """
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(function, name, getattr(shadowed, name))
    function.__signature__ = inspect.signature(shadowed)  # type: ignore[attr-defined]
    function.__dict__.pop("__wrapped__", None)
    made.add(function)
    return function
