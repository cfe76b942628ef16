"""Dataclasses from JSON that anybody may have written: of the fields and types that they have, or refused."""

import contextlib
import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

from hawk_compile.files import shown

Made = TypeVar("Made")


class Misfit(ValueError):
    """A value of another type than its field has; the message says where."""


def made_of(kind: type[Made], content: Any, place: str = "") -> Made:
    """A dataclass from an object of JSON.

    Raises:
        Misfit: no object, a field that is missing or unknown, or a value of another type.
    """
    if not isinstance(content, dict):
        raise Misfit(f"{place or 'it'} must be an object, got {type(content).__name__}")
    hints = hints_of(kind)  # type: ignore[arg-type]
    needed = {
        each.name for each in dataclasses.fields(kind)  # type: ignore[arg-type]
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }  # fmt: skip
    if missing := sorted(needed - content.keys()):
        raise Misfit(f"{place or 'it'} lacks {', '.join(missing)}")
    if unknown := sorted(content.keys() - hints.keys()):
        raise Misfit(f"{place or 'it'} has {shown(', '.join(unknown), 80)}, which is unknown here")
    within = f"{place}." if place else ""
    return kind(**{name: fitted(hints[name], value, f"{within}{name}") for name, value in content.items()})


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def fitted(hint: Any, value: Any, place: str) -> Any:
    """A value of a field, which has the type that the field is annotated with."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return first_fit(parts, value, place)
    if dataclasses.is_dataclass(hint):
        return made_of(hint, value, place)  # type: ignore[arg-type]
    if origin is list and isinstance(value, list):
        return [fitted(parts[0], each, f"{place}[{number}]") for number, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: fitted(parts[1], each, f"{place}.{shown(name, 40)}") for name, each in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:  # a bool is no int here
        return value
    raise Misfit(f"{place} must be {described(hint)}, got {shown(repr(value), 80)}")


def first_fit(hints: tuple[Any, ...], value: Any, place: str) -> Any:
    *others, last = hints
    for hint in others:
        with contextlib.suppress(Misfit):
            return fitted(hint, value, place)
    return fitted(last, value, place)


def described(hint: Any) -> str:
    """A type as it is written."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
