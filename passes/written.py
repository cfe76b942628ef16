"""What a tensor holds after a write into it, as a function without that effect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from hawk_compile.passes.graph import memories

PART = "<the part that is written>"
"""Stands in a written node's arguments for the memory that the write, or a view on the way to it, works on."""
Target = str | Callable[..., Any]


@dataclass(frozen=True)
class Written:
    """A function: what a tensor holds after a write into a part of it."""

    views: tuple[Target, ...]
    """The operators that lead from the tensor to the part."""
    write: Target
    """The operator that writes in place."""
    __name__ = "written"

    def __call__(self, base: Tensor, views: Any, args: Any, kwargs: Any) -> Tensor:
        """`views`: each view's (args, kwargs); the others are the write's. PART stands for what they work on."""
        result = base.clone()
        part = self.part(result, views)
        call(self.write, fill(args, part), fill(kwargs, part))
        return result

    def part(self, tensor: Tensor, views: Any) -> Any:
        """What the views lead to."""
        for view, (args, kwargs) in zip(self.views, views, strict=True):
            tensor = call(view, fill(args, tensor), fill(kwargs, tensor))
        return tensor

    def reaches(self, base: Tensor, views: Any) -> bool:
        """Whether the views lead to memory of the tensor's copy, and not to a copy of that."""
        result = base.clone()
        return memories(self.part(result, views)) == memories(result)


def call(target: Target, args: Any, kwargs: Any) -> Any:
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def fill(argument: Any, part: Any) -> Any:
    """The argument with `part` where PART stands."""
    if isinstance(argument, str):
        return part if argument == PART else argument
    if isinstance(argument, slice):
        return slice(fill(argument.start, part), fill(argument.stop, part), fill(argument.step, part))
    if isinstance(argument, (tuple, list)):
        return type(argument)(fill(each, part) for each in argument)
    if isinstance(argument, dict):
        return {name: fill(each, part) for name, each in argument.items()}
    return argument


def with_part(arguments: Any, part: fx.Node) -> Any:
    """Arguments with PART where the node stands."""
    return map_arg(arguments, lambda source: PART if source is part else source)
