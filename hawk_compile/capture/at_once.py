"""Conditions on the modules beneath a root, asked of all of them at once by functions of C.

The modules are found level by level: from the dictionaries of one level's children come the modules of the next.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import contains, getitem, is_, itemgetter
from typing import Any

from torch import nn

from hawk_compile.capture.conditions import Conditions, Path, Place
from hawk_compile.compat.guards import as_they_are
from hawk_compile.compat.models import MODULES

CHILDREN = itemgetter(MODULES)


class Asked:
    """Conditions in the form in which they are asked, of modules that are numbered level by level."""

    def __init__(self, conditions: Conditions, root: nn.Module) -> None:
        """
        Args:
            root: of modules of which the conditions hold.
        """
        weights, pairs = conditions.apart(root)
        places = [
            *conditions.absent, *conditions.present, *conditions.values, *weights, *chain.from_iterable(pairs)
        ]  # fmt: skip
        paths = every_path([*conditions.classes, *conditions.hookless, *(place.path for place in places)])
        number = {path: at for at, path in enumerate(paths)}
        self.levels = levels_of(paths)
        self.known, self.classes = picked([number[path] for path in conditions.classes]), [*conditions.classes.values()]
        looked_into = [(place.path, place.container) for place in places if place.container]
        inside = dict.fromkeys([*conditions.containers, *looked_into])
        self.holders = picked([number[path] for path, _ in inside])
        self.containers = [container for _, container in inside]
        space = {(path, ""): at for path, at in number.items()} | {
            each: len(number) + at for at, each in enumerate(inside)
        }

        def named(chosen: Sequence[Place]) -> "Names":
            return Names([(space[place.path, place.container], place.name) for place in chosen])

        self.absent, self.present = named([*conditions.absent]), named([*conditions.present])
        self.named, self.values = named([*conditions.values]), [*conditions.values.values()]
        self.classes_of_values = [*map(type, self.values)]
        self.weights, self.fit = named([*weights]), as_they_are([*weights.values()])
        self.left, self.right = (named([pair[side] for pair in pairs]) for side in (0, 1))
        self.of_classes = [*conditions.of_classes.items()]
        alike: dict[tuple[str, ...], list[int]] = {}
        for path, names in conditions.hookless.items():
            alike.setdefault(tuple(names), []).append(number[path])
        self.hooks = [(picked(numbers), several(names)) for names, numbers in alike.items()]

    def hold(self, root: nn.Module) -> bool:
        """Whether all conditions hold of the modules beneath a root."""
        try:
            return self.held_by(root)
        except (KeyError, TypeError, AttributeError):  # something is gone, or no module any more
            return False

    def held_by(self, root: nn.Module) -> bool:
        modules = [root]
        here: list[Any] = [vars(root)]
        spaces = [*here]
        for parents, names in self.levels:
            level = [*map(getitem, parents([*map(CHILDREN, here)]), names)]
            here = [*map(vars, level)]
            modules += level
            spaces += here
        if [*map(type, self.known(modules))] != self.classes:
            return False
        if any(any(chain.from_iterable(map(names, of(spaces)))) for of, names in self.hooks):
            return False
        containers = [*map(getitem, self.holders(spaces), self.containers)]
        if not {*map(type, containers)} <= {dict}:
            return False
        spaces += containers
        if self.absent.any_in(spaces) or not self.present.all_in(spaces):
            return False
        values = self.named.found(spaces)
        return (
            [*map(type, values)] == self.classes_of_values
            and values == self.values
            and self.fit(*self.weights.found(spaces))
            and all(map(is_, self.left.found(spaces), self.right.found(spaces)))
            and all(hasattr(kind, name) == there for (kind, name), there in self.of_classes)
        )


class Names:
    """Names in numbered dictionaries, looked up all at once."""

    def __init__(self, places: Sequence[tuple[int, str]]) -> None:
        self.of = picked([number for number, _ in places])
        self.names = [name for _, name in places]

    def found(self, spaces: Sequence[dict[str, Any]]) -> list[Any]:
        """What stands there; KeyError where a name is gone."""
        return [*map(getitem, self.of(spaces), self.names)]

    def any_in(self, spaces: Sequence[dict[str, Any]]) -> bool:
        return any(map(contains, self.of(spaces), self.names))

    def all_in(self, spaces: Sequence[dict[str, Any]]) -> bool:
        return all(map(contains, self.of(spaces), self.names))


def picked(numbers: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes the items of these numbers from a list."""
    if len(numbers) < 2:
        return lambda items: [items[number] for number in numbers]
    return itemgetter(*numbers)


def several(names: Sequence[str]) -> Callable[[dict[str, Any]], Sequence[Any]]:
    """What takes the values of these names from a dictionary."""
    return itemgetter(*names) if len(names) > 1 else lambda space: [space[name] for name in names]


def every_path(paths: Sequence[Path]) -> list[Path]:
    """These paths and those of the modules around them, level by level."""
    known = {path[:length]: None for path in paths for length in range(len(path) + 1)}
    return sorted({**known, (): None}, key=len)


def levels_of(paths: Sequence[Path]) -> list[tuple[Callable[[Sequence[Any]], Sequence[Any]], list[str]]]:
    """For each level behind the root: what takes the parents of its modules from the level before, and their names."""
    levels = []
    before: list[Path] = [()]
    while here := [path for path in paths if len(path) == len(before[0]) + 1]:
        number = {path: at for at, path in enumerate(before)}
        levels.append((picked([number[path[:-1]] for path in here]), [path[-1] for path in here]))
        before = here
    return levels
