"""A copy of a module that shares its tensors and can be configured apart from it.

Parameters, buffers and hooks are shared by the dictionaries that hold them: what `to`, `load_state_dict` or an
optimiser puts there on the original is there on the copy. Everything else is the copy's own; `unchanged` says whether
the original still is what was copied (a layer replaced by an adapter, a forward wrapped, another mode or setting).
"""

import copy
import inspect
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hawk_compile.compat.models import MODULES, PARAMETERS, is_tensors_or_hooks


def sharing_copy(module: nn.Module) -> nn.Module:
    """A deep copy but for tensors and hooks; methods that were put on the modules are the copy's."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if is_tensors_or_hooks(name) or isinstance(value, Tensor):
                memo[id(value)] = value
    return copy.deepcopy(module, memo)


def snapshot(module: nn.Module) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Every dictionary of attributes, submodules and settings of a module, with the values that it has now."""
    return [(held, tuple(held.values())) for held in dictionaries(module)]


def unchanged(module: nn.Module, before: list[tuple[dict[str, Any], tuple[Any, ...]]]) -> bool:
    """Whether a module holds the very objects that it held at its snapshot. Tensors may have been replaced."""
    return all(
        len(held) == len(values) and all(map(operator.is_, held.values(), values)) for held, values in before
    )


def dictionaries(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Those of all modules inside; one that is not held any more is found by the one that held it."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        yield vars(part)
        yield getattr(part, MODULES)
        if hasattr(part, "config"):
            configs[id(part.config)] = part.config
    yield from (vars(config) for config in configs.values())


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> Any:
    """A module of the same class and attributes with other submodules of these names; its own methods are rebound."""
    shell = object.__new__(type(module))
    attributes = {**vars(module), MODULES: {**getattr(module, MODULES), **children}}
    shell.__dict__.update({
        name: types.MethodType(value.__func__, shell) if inspect.ismethod(value) and value.__self__ is module else value
        for name, value in attributes.items()
    })
    return shell


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A module of the same class and attributes with these weights alone, by their dotted names."""
    shell = with_children(module, {
        name: with_tensors(child, {
            path.removeprefix(f"{name}."): tensor for path, tensor in tensors.items() if path.startswith(f"{name}.")
        })
        for name, child in module.named_children()
    })  # fmt: skip
    shell.__dict__[PARAMETERS] = {name: tensors.get(name) for name in getattr(module, PARAMETERS)}
    return shell
