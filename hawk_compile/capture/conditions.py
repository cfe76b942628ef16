"""The conditions on a model's modules under which its graphs hold, taken over from Dynamo to be asked all at once.

    a layer of Qwen2.5-VL has 14 modules, and its graph some 240 conditions:
    no hooks 84, names that an object lacks 48, classes 42, numbers and switches 44, sizes and dtypes of weights 12, ...

Dynamo walks to each of them by its path, at every call. They are of few kinds, and what `at_once.py` asks is what
Dynamo would ask. A condition is taken over only if it is of a kind below, and if what its path leads to is the very
object that Dynamo has found; all others stay with Dynamo.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hawk_compile.compat import guards as kinds
from hawk_compile.compat.guards import Guard
from hawk_compile.compat.models import BUFFERS, MODULES, PARAMETERS

CONTAINERS = (MODULES, PARAMETERS, BUFFERS)
"""Where a module holds what is found on it by name and is no attribute of it."""
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
"""Classes of values that cannot change, nor can tuples of them: what is equal, and of the same class, is the same."""
WEIGHTS = (Tensor, nn.Parameter)

Path = tuple[str, ...]
"""Names of modules, from the root on."""


def is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(map(is_plain, value)))


class Place(NamedTuple):
    """A name in a dictionary of a module: among its attributes, where `container` is empty."""

    path: Path
    container: str
    name: str


class Conditions:
    """What must be so of the modules beneath a root, one condition after another."""

    def __init__(self) -> None:
        self.classes: dict[Path, type] = {}
        self.hookless: dict[Path, dict[str, None]] = {}
        self.containers: dict[tuple[Path, str], None] = {}
        self.absent: dict[Place, None] = {}
        self.present: dict[Place, None] = {}
        self.values: dict[Place, Any] = {}
        self.weights: dict[Place, None] = {}
        self.same: dict[tuple[Place, Place], None] = {}
        self.of_classes: dict[tuple[type, str], bool] = {}
        """(class, name) -> whether the class has it."""

    def take(self, root: nn.Module, guards: Sequence[Guard]) -> list[bool]:
        """Which of Dynamo's conditions are not taken over."""
        constants = {kinds.place_of(guard) for guard in guards if guard.guard_type in kinds.VALUE}
        return [not self.taken(root, guard, constants) for guard in guards]

    def taken(self, root: nn.Module, guard: Guard, constants: set[str]) -> bool:
        """Take one of Dynamo's conditions over, if it is of a kind that is asked here."""
        found = parsed(kinds.place_of(guard))
        module = None if found is None else module_at(root, found[0])
        if found is None or module is None or not guard.has_value:
            return False
        path, rest = found
        if not rest:
            return module is guard.value and self.of_module(path, module, guard)
        place = place_of(path, rest)
        if place is None:
            return False
        if not place.container and place.name in CONTAINERS:
            return vars(module).get(place.name) is guard.value and self.of_container(path, module, guard, place.name)
        held = container_of(module, place.container)
        if place.name not in held or held[place.name] is not guard.value:
            return False
        return self.of_held(root, place, guard, constants)

    def of_module(self, path: Path, module: nn.Module, guard: Guard) -> bool:
        if guard.guard_type == kinds.CLASS:
            self.classes[path] = type(module)
            return True
        name = kinds.attribute_of(guard)
        if name is None:
            return False
        if guard.guard_type == kinds.NO_ATTRIBUTE and name not in vars(module):
            self.absent[Place(path, "", name)] = None
        elif guard.guard_type == kinds.WHETHER:
            self.has(path, module, name)
        else:
            return False
        return True

    def has(self, path: Path, module: nn.Module, name: str) -> None:
        """Whether a module has something of that name, wherever it would be looked for."""
        where = next((each for each in ("", *CONTAINERS) if name in container_of(module, each)), None)
        if where is not None:
            self.present[Place(path, where, name)] = None
            return
        self.classes[path] = type(module)
        self.of_classes[type(module), name] = hasattr(type(module), name)
        if not hasattr(type(module), name):
            self.absent |= {Place(path, each, name): None for each in ("", *CONTAINERS)}

    def of_container(self, path: Path, module: nn.Module, guard: Guard, container: str) -> bool:
        key = kinds.key_of(guard)
        if guard.guard_type == kinds.NO_KEY and key is not None and key not in container_of(module, container):
            self.absent[Place(path, container, key)] = None
        elif guard.guard_type != kinds.CLASS or type(guard.value) is not dict:
            return False
        self.containers[path, container] = None
        return True

    def of_held(self, root: nn.Module, place: Place, guard: Guard, constants: set[str]) -> bool:
        kind, value = guard.guard_type, guard.value
        if kind == kinds.NO_HOOKS and not place.container and not value:
            self.hookless.setdefault(place.path, {})[place.name] = None
        elif is_plain(value) and (
            kind in kinds.VALUE or (kind in kinds.OF_ANY_VALUE and kinds.place_of(guard) in constants)
        ):
            self.values[place] = value
        elif kind == kinds.TENSOR and place.container and type(value) in WEIGHTS:
            self.weights[place] = None
        elif kind == kinds.ONE:
            other = parsed(kinds.twin_of(guard) or "")
            twin = None if other is None else place_of(*other)
            if twin is None or at(root, twin) is not value:
                return False
            self.same[place, twin] = None
        else:
            return False
        return True

    def apart(self, root: nn.Module) -> tuple[dict[Place, Tensor], list[tuple[Place, Place]]]:
        """(the weights, no two of which are one; pairs of places that hold the same)."""
        first: dict[int, Place] = {}
        pairs, weights = [*self.same], {}
        for place in self.weights:
            weight = at(root, place)
            if first.setdefault(id(weight), place) == place:
                weights[place] = weight
            else:
                pairs.append((place, first[id(weight)]))
        return weights, pairs


def parsed(name: str) -> tuple[Path, str] | None:
    """(path of the innermost module, what follows it) of one of Dynamo's names; None if it does not begin at the
    root."""
    if not name.startswith(kinds.OWNER):
        return None
    rest, path = name[len(kinds.OWNER) :], []
    while step := kinds.CHILD.match(rest):
        path.append(step[1])
        rest = rest[step.end() :]
    return tuple(path), rest


def place_of(path: Path, rest: str) -> Place | None:
    """The place that one more step from a module leads to; None if it is none, or leads further."""
    if not rest:
        return Place(path[:-1], MODULES, path[-1]) if path else None
    if held := kinds.HELD.fullmatch(rest):
        return Place(path, held[1], held[2])
    attribute = kinds.ATTRIBUTE.fullmatch(rest)
    return Place(path, "", attribute[1]) if attribute else None


def module_at(root: nn.Module, path: Path) -> nn.Module | None:
    found: Any = root
    for name in path:
        found = vars(found).get(MODULES, {}).get(name) if isinstance(found, nn.Module) else None
    return found if isinstance(found, nn.Module) else None


def container_of(module: nn.Module, container: str) -> dict[str, Any]:
    """A module's attributes, or what it holds in one of its containers."""
    space = vars(module)
    return space.get(container, {}) if container else space


def at(root: nn.Module, place: Place) -> Any:
    module = module_at(root, place.path)
    return None if module is None else container_of(module, place.container).get(place.name)
