"""A call of a prefill, and what it returns, in JSON; the tensors stand apart, in one order.

    {"input_ids": Tensor, "use_cache": True}    ["dict", [["input_ids", ["tensor", "int64", "cpu", 2]],
                                                          ["use_cache", ["plain", "bool", true]]]]
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import ModelOutput

from hawk_compile.exporting.schema import Misfit

PLAIN = (bool, int, float, str, type(None))


class NotSaved(Exception):
    """A call that no folder can serve; the message says why."""


def described(value: Any, tensors: list[Tensor]) -> Any:
    """What a value of a call is made of, but for the sizes and numbers of its tensors, which are added to a list.

    Raises:
        NotSaved: it holds what has no description.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        tensors.append(value)
        return ["tensor", name_of_dtype(value.dtype), value.device.type, value.ndim]
    if kind in PLAIN:
        return ["plain", kind.__name__, value]
    if isinstance(value, ModelOutput):
        return ["output", name_of(kind), [[name, described(held, tensors)] for name, held in value.items()]]
    if kind is dict:
        return ["dict", [[name, described(held, tensors)] for name, held in value.items()]]
    if kind in (list, tuple):
        return [kind.__name__, [described(held, tensors) for held in value]]
    if isinstance(value, Cache):
        return described_cache(value)
    raise NotSaved(f"it is given a {kind.__name__}")


def described_cache(cache: Cache) -> Any:
    if type(cache) is not DynamicCache or any(holds_tensors(vars(layer)) for layer in cache.layers):
        raise NotSaved("it goes on with a cache that holds something")
    return ["cache", [name_of(type(layer)) for layer in cache.layers]]


def holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensors, value))
    return isinstance(value, Tensor)


class Recipe:
    """How what a graph returns becomes what the call returned: by which of its tensors stand where.

    Args:
        tensors: of the call. outputs: of the graph. cache: that of the call, empty when it began.
    """

    def __init__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor], cache: Cache) -> None:
        self.places = {id(tensor): ["argument", place] for place, tensor in enumerate(tensors)}
        self.places |= {id(tensor): ["result", place] for place, tensor in enumerate(outputs)}
        self.cache = cache

    def of(self, value: Any) -> Any:
        """The recipe of a value.

        Raises:
            NotSaved: it holds what is neither of the graph nor plain.
        """
        kind = type(value)
        if id(value) in self.places:
            return self.places[id(value)]
        if value is self.cache:
            return ["cache", [[name_of(type(layer)), self.of(dict(vars(layer)))] for layer in value.layers]]
        if kind in PLAIN:
            return ["plain", kind.__name__, value]
        if kind is torch.dtype:
            return ["dtype", name_of_dtype(value)]
        if kind is torch.device:
            return ["device", str(value)]
        if isinstance(value, ModelOutput):
            return ["output", name_of(kind), [[name, self.of(held)] for name, held in value.items()]]
        if kind is dict:
            if not all(type(name) in (str, int) for name in value):
                raise NotSaved("it returns a dictionary whose keys are neither texts nor numbers")
            return ["dict", [[name, self.of(held)] for name, held in value.items()]]
        if kind in (list, tuple):
            return [kind.__name__, [self.of(held) for held in value]]
        raise NotSaved(f"it returns a {kind.__name__} that its graph does not give")


Build = Callable[[Sequence[Tensor], Sequence[Tensor], Cache], Any]
"""(the call's tensors, the graph's, the call's cache) -> what the call returns."""


def builder(recipe: Any, depth: int = 0) -> Build:
    """What follows a recipe. The caches and outputs that it makes are of classes that this process has imported.

    Raises:
        Misfit: no recipe.
    """
    if not isinstance(recipe, list) or not recipe or depth > 20:
        raise Misfit("a recipe must be a list that begins with a word")
    word, *parts = recipe
    match word, parts:
        case "argument", [int(place)]:
            return lambda tensors, results, cache: tensors[place]
        case "result", [int(place)]:
            return lambda tensors, results, cache: results[place]
        case "plain", [str(kind), value] if type(value).__name__ == kind and type(value) in PLAIN:
            return lambda tensors, results, cache: value
        case "dtype", [str(name)]:
            return constant(dtype_named(name))
        case "device", [str(name)]:
            return constant(torch.device(name))
        case "output", [str(name), list(fields)]:
            kind, named = class_named(name, ModelOutput), pairs(fields, depth)
            return lambda *given: kind(**{name: make(*given) for name, make in named})
        case "dict", [list(fields)]:
            named = pairs(fields, depth)
            return lambda *given: {name: make(*given) for name, make in named}
        case ("list" | "tuple"), [list(held)]:
            made = [builder(each, depth + 1) for each in held]
            whole = list if word == "list" else tuple
            return lambda *given: whole(make(*given) for make in made)
        case "cache", [list(layers)]:
            return cache_builder(layers, depth)
    raise Misfit(f"a recipe cannot be {str(recipe)[:80]}")


def constant(value: Any) -> Build:
    return lambda tensors, results, cache: value


def pairs(fields: list[Any], depth: int) -> list[tuple[Any, Build]]:
    if not all(isinstance(each, list) and len(each) == 2 and type(each[0]) in (str, int) for each in fields):
        raise Misfit("fields of a recipe must be pairs of a name and a recipe")
    return [(name, builder(held, depth + 1)) for name, held in fields]


def cache_builder(layers: list[Any], depth: int) -> Build:
    """What fills the call's cache: its layers, and those that it makes when it is filled."""
    if not all(isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) for each in layers):
        raise Misfit("layers of a recipe must be pairs of a class and its attributes")
    made = [(class_named(name, CacheLayerMixin), builder(held, depth + 1)) for name, held in layers]

    def fill(tensors: Sequence[Tensor], results: Sequence[Tensor], cache: Cache) -> Cache:
        for number, (kind, attributes) in enumerate(made):
            if number == len(cache.layers):
                cache.layers.append(object.__new__(kind))
            vars(cache.layers[number]).update(attributes(tensors, results, cache))
        return cache

    return fill


def name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def class_named(name: str, above: type) -> Any:
    """A class that this process has, of those of a kind.

    Raises:
        Misfit: there is none of that name.
    """
    module, _, path = name.partition(":")
    found = getattr(sys.modules.get(module), path, None)
    if not isinstance(found, type) or not issubclass(found, above):
        raise Misfit(f"{name[:80]} is no {above.__name__} that is here")
    return found


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Misfit(f"{name[:80]} is no dtype")
    return found
