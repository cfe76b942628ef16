"""Kinds of prefills: calls without their numbers, by which their graphs can be captured again."""

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from hawk_compile.runtime.conversation import physical_length

Kind = tuple[dict[str, Any], tuple[Any, ...], tuple[str, ...]]
"""(inputs, planned, along), as `planned_forward` takes them, tensors on the meta device and no cache."""


def kind_of(
    forward: Callable[..., Any], inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Any, ...],
    along: tuple[str, ...] = (),
) -> Kind | str:  # fmt: skip
    """The kind of a call; or why it can be captured here alone."""
    if past_mask is not None or physical_length(inputs["past_key_values"]):
        return "it goes on with a cache that holds something"
    if not isinstance(forward, types.MethodType):
        return "its model merges features itself"
    return without_numbers({**inputs, "past_key_values": None}), without_numbers(planned), along


def without_numbers(value: Any) -> Any:
    return mapped(value, lambda tensor: tensor.to("meta"))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value of a call with each of its tensors changed; what holds none is as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: mapped(held, change) for name, held in value.items()})
    if type(value) is dict:
        return {name: mapped(held, change) for name, held in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(held, change) for held in value)
    return value
