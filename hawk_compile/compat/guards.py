"""Private names of torch.compile's guards: what each asks, and where it looks.

A guard's place is an expression of Python, L being the locals of the frame that was captured:

    L['args'][0].__self__._modules['model']._modules['norm']._parameters['weight']
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._dynamo.types import GuardFilterEntry as Guard

from hawk_compile.compat.models import BUFFERS, MODULES, PARAMETERS

GUARD_FILTER = "guard_filter_fn"
"""The option of torch.compile that says which of a graph's guards are asked."""

OWNER = "L['args'][0].__self__"
"""The object whose method is the first argument of a function that takes `*args`."""
CHILD = re.compile(rf"\.{MODULES}\['([^']*)'\]")
HELD = re.compile(rf"\.({PARAMETERS}|{BUFFERS})\['([^']*)'\]")
ATTRIBUTE = re.compile(r"\.(\w+)")

CLASS = "TYPE_MATCH"
VALUE = ("CONSTANT_MATCH", "EQUALS_MATCH")
OF_ANY_VALUE = (CLASS, "SEQUENCE_LENGTH")
TENSOR = "TENSOR_MATCH"
ONE = "DUPLICATE_INPUT"
NO_HOOKS = "EMPTY_NN_MODULE_HOOKS_DICT"
NO_ATTRIBUTE = "NOT_PRESENT_IN_GENERIC_DICT"
NO_KEY = "DICT_NOT_CONTAINS"
WHETHER = "HASATTR"
"""Kinds of guards: of an object's class; of a value that is equal, and what may be asked of it beside; of a tensor's
class, dtype, sizes and more; that two places hold one object; that a dictionary of hooks is empty; that an object has
no attribute of its own, a dictionary no key; whether an object has an attribute at all."""


def place_of(guard: Guard) -> str:
    return guard.orig_guard.name


def attribute_of(guard: Guard) -> str | None:
    """The attribute that NO_ATTRIBUTE and WHETHER ask for; None, as below, if it is said in another way."""
    return argument_of(guard, "attr")  # type: ignore[no-any-return]


def key_of(guard: Guard) -> Any:
    """The key that NO_KEY asks for."""
    return argument_of(guard, "key")


def twin_of(guard: Guard) -> str | None:
    """The other place, of ONE."""
    return getattr(argument_of(guard, "source_b"), "name", None)


def argument_of(guard: Guard, name: str) -> Any:
    return getattr(guard.orig_guard.create_fn, "keywords", {}).get(name)


def as_they_are(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What says of as many tensors, given one by one, whether each is as the one here was, by what a guard of a tensor
    asks: its class, dtype, device, sizes, strides, whether it takes gradients, and how this thread's calls of operators
    would be dispatched on it; and whether no two are one."""
    if not tensors:
        return lambda: True
    sizes, strides = [list(each.shape) for each in tensors], [list(each.stride()) for each in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[arg-type]
