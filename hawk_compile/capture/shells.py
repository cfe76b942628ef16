"""Modules without their weights, which an operator of the graph runs with those that it is given.

Code that no graph can take (a loop whose length is data) becomes one opaque operator: what it runs is the model's own
forward, so numerics are the model's. Weights are its inputs, as they are of any operator; all else that the forward may
read stays with a *shell* of the module, which the operator finds by a name. The name says all that, so that modules of
the same name are the same but for weights. A module of which that cannot be said has no shell.

Classes belong to modeling files, so what stands in for a forward is seen by every model of that file. It makes a
difference only to what Dynamo captures without gradients, and goes with the last model that needs it.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hawk_compile.capture.twin import with_tensors
from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import is_tensors_or_hooks

Forward = Callable[..., Any]

OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that torch itself needs."""
shells: dict[str, tuple[nn.Module, list[str]]] = {}
"""Modules without their weights, and the names of these, by all that tells them from others."""


def description(module: nn.Module, but: tuple[str, ...] = ()) -> str | None:
    """All of a module apart from its weights, in words; None where something of it has no words, as a tensor has none.

    Args:
        but: attributes of it that make no difference.
    """
    words = {
        name: in_words(value) for name, value in vars(module).items()
        if name not in (*OF_EVERY_MODULE, *but) and not is_tensors_or_hooks(name)
    }  # fmt: skip
    parts = {name: description(child) for name, child in module.named_children()}
    if None in words.values() or None in parts.values() or dict(module.named_buffers(recurse=False)):
        return None
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}({words}, {parts})"


def in_words(value: Any) -> str | None:
    """A setting in words that no other setting has."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, PretrainedConfig):
        return f"{type(value).__qualname__}{value.to_json_string(use_diff=False)}"
    if isinstance(value, types.FunctionType) and value.__closure__ is None and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (list, tuple, dict)):
        inner = [in_words(each) for each in ([*value.items()] if isinstance(value, dict) else value)]
        return None if None in inner else f"{type(value).__name__}{inner}"
    return None


@torch.compiler.assume_constant_result
def names_of_weights(module: nn.Module) -> str:
    return ",".join(name for name, _ in module.named_parameters())


def weights_of(module: nn.Module) -> list[Tensor]:
    """A module's weights in the order of their names, by attributes, which Dynamo follows."""
    found = []
    for path in names_of_weights(module).split(","):
        weight: Any = module
        for name in path.split("."):
            weight = getattr(weight, name)
        found.append(weight)
    return found


@torch.compiler.assume_constant_result
def name_of_shell(module: nn.Module, but: tuple[str, ...] = ()) -> str:
    """The name of the shell with which a module is run; graphs of equal modules are equal. '' if it has none."""
    name = description(module, but) or ""
    if name and name not in shells:
        shells[name] = with_tensors(module, {}), names_of_weights(module).split(",")
    return name


def filled(name: str, weights: Sequence[Tensor]) -> nn.Module:
    """The module of a shell's name with these weights."""
    shell, names = shells[name]
    return with_tensors(shell, dict(zip(names, weights, strict=True)))


class ForwardsStoodFor(WhileUsed):
    """Lets what is captured of models hold an operator for each module of some kind.

    Attributes:
        originals: the classes' own forwards.
        stand_ins: what stands in for them, by class; always the same, since what was captured is guarded by them.
    """

    def __init__(self, wanted: Callable[[nn.Module], bool], stand_in: Callable[[Forward], Forward]) -> None:
        """
        Args:
            wanted: whether a module is of that kind.
            stand_in: makes what stands in for a class's forward.
        """
        super().__init__()
        self.wanted, self.stand_in = wanted, stand_in
        self.originals: dict[Any, Forward] = {}
        self.stand_ins: dict[Any, Forward] = {}

    def change(self, model: nn.Module | None = None) -> None:
        """For a model's modules; none for a copy of a model that has them already."""
        for kind in {type(each) for each in model.modules() if self.wanted(each)} if model is not None else ():
            if kind not in self.stand_ins:
                self.originals[kind] = kind.forward
                self.stand_ins[kind] = self.stand_in(kind.forward)
            if kind.forward is self.originals[kind]:
                kind.forward = self.stand_ins[kind]

    def undo(self) -> None:
        for kind, ours in self.stand_ins.items():
            if kind.forward is ours:
                kind.forward = self.originals[kind]

    def run(self, name: str, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The own forward of the module of a shell's name with these weights."""
        module = filled(name, weights)
        return self.originals[type(module)](module, *args, **kwargs)
