"""What an encoder is at a moment but for the numbers in its tensors, so that what it made of an image can be told from
what it would make of it now.

Its modules, their attributes, hooks, configurations and classes, and the code that these run, are compared as objects:
where one was replaced, added or taken off, it is another encoder. Lists, dictionaries and objects within are looked
into, since adapters switch and scale there.
"""

import functools
import operator
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawk_compile.capture.encoder_numbers import NotKept, numbers_of
from hawk_compile.capture.hooks import room_of
from hawk_compile.capture.inside import shards
from hawk_compile.compat.accelerate import HOOK, brings_weights, hooks_on
from hawk_compile.compat.models import MODULES, attention_of
from hawk_compile.compat.modes import hooks_of

MOST = 20_000
"""Objects that are looked at; an encoder that holds more holds something else."""
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)
"""What is known by being itself."""
VALUES = operator.methodcaller("values")
LEFT_OUT = (MODULES, "rope_deltas")
"""Attributes of a body that are no encoder's, or that a call leaves there for the next one."""
OURS = "hawk_compile."
CACHED = type(functools.cache(len))
"""The class of what `functools.cache` makes of a function."""


class Structure:
    """An encoder but for the numbers in its tensors, as it was when this was made.

    Attributes:
        refusal: why nothing that it encodes can be kept; "" if it can.
        alone: modality -> whether its images may be encoded one by one, once that is known.
        checked: of what it was seen that no weights but the encoder's are read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.alone: dict[str, bool] = {}
        self.checked: set[Any] = set()
        self.base: Any = model.base_model
        within = Within([*parts_of(model), *self.body().values(), self.base.config])
        modules = [self.base, *within.modules]
        self.refusal = refusal_of(modules)
        kinds = {kind for module in modules for kind in type(module).__mro__ if is_of_model(kind)}
        self.configs, self.sets, self.in_tuples = within.configs, within.sets, within.in_tuples
        self.code = globals_read_by(kinds)
        self.attention = self.attention_now()
        plain = [held for held in within.dicts if not any_tensor(held.values())]
        self.spaces: list[Any] = [getattr(self.base, MODULES), *map(vars, kinds), *plain]
        self.lengths = [*map(len, self.spaces)]
        self.keys, self.values = [*chain.from_iterable(self.spaces)], [*chain.from_iterable(map(VALUES, self.spaces))]
        self.body_items = without_numbers(self.body())
        self.mixed = [(held, without_numbers(held)) for held in within.dicts if any_tensor(held.values())]
        self.lists = [(held, [*map(without_number, held)]) for held in within.lists]

    def body(self) -> dict[str, Any]:
        """The attributes of the body that its encoder may read."""
        return {
            name: value for name, value in vars(self.base).items() if name not in LEFT_OUT and not is_ours(value)
        }

    def attention_now(self) -> list[Any]:
        """The functions by which it attends."""
        return [ALL_ATTENTION_FUNCTIONS.get(attention_of(config)) for config in self.configs]

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether a model's encoder still is this one, but for the numbers in its tensors."""
        try:
            return model.base_model is self.base and self.is_as_it_was()
        except RuntimeError:  # another thread changes a dictionary meanwhile
            return False

    def is_as_it_was(self) -> bool:
        return (
            [*map(len, self.spaces)] == self.lengths
            and all(map(operator.is_, chain.from_iterable(map(VALUES, self.spaces)), self.values))
            and [*chain.from_iterable(self.spaces)] == self.keys
            and all(space.get(name) is value for space, name, value in self.code)
            and same_items(self.body(), self.body_items)
            and all(same_items(held, before) for held, before in self.mixed)
            and all(len(held) == len(before) and all(map(same, held, before)) for held, before in self.lists)
            and all(held == before for held, before in self.sets)
            and all(map(operator.is_, self.attention_now(), self.attention))
        )

    def tensors(self) -> Iterator[Tensor]:
        """Those of the encoder, in an order of their own."""
        held: Iterable[Any] = chain(
            self.body().values(), *(each.values() for each, _ in self.mixed), *(each for each, _ in self.lists),
            self.in_tuples,
        )  # fmt: skip
        return (value for value in held if isinstance(value, Tensor))

    def numbers(self) -> bytes:
        """What tells the numbers in its tensors from others: see `numbers_of`."""
        return numbers_of(self.tensors())


class Within:
    """What some values hold, as far as it can be changed.

    Raises:
        NotKept: more than can be looked at.
    """

    def __init__(self, values: list[Any]) -> None:
        self.modules: list[nn.Module] = []
        self.dicts: list[dict[Any, Any]] = []
        self.lists: list[Any] = []
        self.sets: list[tuple[Any, Any]] = []
        self.configs: list[Any] = []
        self.in_tuples: list[Tensor] = []
        known: dict[int, Any] = {}
        waiting = [*values]
        while waiting:
            value = waiting.pop()
            if isinstance(value, (*PLAIN, *OPAQUE, Tensor)) or id(value) in known:
                continue
            known[id(value)] = value
            if len(known) > MOST:
                raise NotKept(f"its encoder holds more than {MOST:,} objects")
            waiting += self.look_into(value)

    def look_into(self, value: Any) -> Iterable[Any]:
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return [vars(value)]
        if isinstance(value, dict):
            self.dicts.append(value)
            return value.values()
        if isinstance(value, (list, deque)):
            self.lists.append(value)
            return value
        if isinstance(value, tuple):
            self.in_tuples += (each for each in value if isinstance(each, Tensor))
            return value
        if isinstance(value, (set, frozenset)):
            self.sets.append((value, frozenset(value)))
            return ()
        if isinstance(value, PretrainedConfig):
            self.configs.append(value)
        return [vars(value)] if hasattr(value, "__dict__") else ()


def parts_of(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model's body but for its decoder and what reads that."""
    base: Any = model.base_model
    decoder, head = base.get_decoder(), model.get_output_embeddings()
    return [
        child for child in base.children()
        if child is not head and not any(part is decoder for part in child.modules())
    ]  # fmt: skip


def refusal_of(modules: list[nn.Module]) -> str:
    """Why nothing that these modules encode can be kept; "" if it can."""
    for module in modules:
        name = type(module).__name__
        if module.training:
            return f"{name} of its encoder is in training mode"
        if isinstance(module, shards()):
            return f"{name} of its encoder is sharded by FSDP"
        if hooks := [hook for hook in hooks_of(module) if room_of(hook).partition(".")[0] != "transformers"]:
            return f"a hook of {room_of(hooks[0])} stands on {name} of its encoder"
        if HOOK in vars(module) and any(map(brings_weights, hooks_on(module))):
            return f"{name} of its encoder is offloaded"
    return ""


def is_of_model(kind: type) -> bool:
    """Whether a class is a model's own, and not what all models are."""
    return kind not in (object, PreTrainedModel) and kind.__module__.partition(".")[0] not in ("torch", "builtins")


def is_ours(value: Any) -> bool:
    """Whether an attribute is something that `optimize` has put on."""
    space = getattr(getattr(value, "__func__", None), "__globals__", {})
    return str(space.get("__name__", type(value).__module__)).startswith(OURS)


def globals_read_by(kinds: Iterable[type]) -> list[tuple[dict[str, Any], str, Any]]:
    """(globals, name, value) of what the code of classes reads, and the functions that it calls by name."""
    waiting = [held for kind in kinds for held in vars(kind).values()]
    found: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    known: set[int] = set()
    while waiting:
        value = waiting.pop()
        waiting += (held for held in (wrapped_by(value),) if held is not None)
        function = function_of(value)
        if function is None or id(function) in known or str(function.__module__).partition(".")[0] == "torch":
            continue
        known.add(id(function))
        space = function.__globals__
        for name in names_in(function.__code__):
            if name in space and (id(space), name) not in found:
                found[id(space), name] = (space, name, space[name])
                waiting.append(space[name])
        waiting += (cell.cell_contents for cell in function.__closure__ or () if holds_something(cell))
    return [*found.values()]


def function_of(value: Any) -> types.FunctionType | None:
    """The function of Python that is called where a value is; None where there is none. Attributes are asked of what
    has them alone: classes that stand for packages that are not installed raise."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def wrapped_by(value: Any) -> Any:
    """What a function, or a cache around one, says that it wraps."""
    inner = function_of(value) or value
    wraps = isinstance(inner, types.FunctionType) or type(inner) is CACHED
    return vars(inner).get("__wrapped__") if wraps else None


def holds_something(cell: Any) -> bool:
    try:
        return callable(cell.cell_contents)
    except ValueError:
        return False


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


class Number:
    """Stands for a tensor where only that there is one is compared."""


def without_number(value: Any) -> Any:
    return Number if isinstance(value, Tensor) else value


def without_numbers(items: dict[Any, Any]) -> dict[Any, Any]:
    return {key: without_number(value) for key, value in items.items()}


def same(now: Any, before: Any) -> bool:
    return now is before or (before is Number and isinstance(now, Tensor))


def same_items(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return [*now] == [*before] and all(map(same, now.values(), before.values()))


def any_tensor(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)
