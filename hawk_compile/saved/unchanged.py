"""Whether a model is what it was when its graphs were loaded, but for the numbers in its weights.

Dynamo asks a model for what its trace has read of it. Of a graph that another process has captured nobody knows what
that was, so all of it is asked: every attribute of every module in the graph, configurations, hooks, dtypes and shapes
of weights, the methods of classes, the functions in the models' files, and torch's own switches.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawk_compile.capture.inside import graph_modules
from hawk_compile.compat.guards import as_they_are
from hawk_compile.compat.models import BUFFERS, MODULES, PARAMETERS
from hawk_compile.compat.modes import switches_of_torch
from hawk_compile.runtime.state import PART, REDUCE, RUNTIME

OF_CALLS = ("rope_deltas", "generation_config")
"""Attributes of a model that calls change, and that no prefill reads."""
OURS = (RUNTIME, PART, REDUCE)


VALUES = methodcaller("values")


class Together:
    """What stood in dictionaries, lists and sets, all of them asked at once by functions of C.

    Args:
        held: nothing in them is without a meaning.
    """

    def __init__(self, held: Sequence[Any]) -> None:
        self.empty = [each for each in held if not each]
        self.held = [each for each in held if each]
        self.dictionaries = [each for each in self.held if isinstance(each, dict)]
        self.sizes = [*map(len, self.held)]
        self.names = [*chain.from_iterable(self.held)]
        self.values = [*chain.from_iterable(map(VALUES, self.dictionaries))]

    def is_same(self) -> bool:
        return (
            not any(self.empty)
            and [*map(len, self.held)] == self.sizes
            and all(map(is_, chain.from_iterable(map(VALUES, self.dictionaries)), self.values))
            and all(map(is_, chain.from_iterable(self.held), self.names))
        )


class Told:
    """What stood for the names in a space, but for those that say nothing."""

    def __init__(self, space: Mapping[Any, Any], ignored: Callable[[Any], bool]) -> None:
        self.space, self.ignored = space, ignored
        self.size, self.held = len(space), self.telling()

    def telling(self) -> dict[Any, Any]:
        return {name: value for name, value in self.space.items() if not self.ignored(name)}

    def is_same(self) -> bool:
        space = self.space
        if not all(space.get(name, self) is value for name, value in self.held.items()):
            return False
        return len(space) == self.size or self.telling().keys() == self.held.keys()


class Functions:
    """The functions and classes of a file, or of a table."""

    def __init__(self, space: Mapping[str, Any]) -> None:
        self.space = space
        self.held = {name: value for name, value in space.items() if callable(value)}

    def is_same(self) -> bool:
        return all(self.space.get(name) is value for name, value in self.held.items())


class Unchanged:
    """What a model was when this was made. Made without gradients, as prefills run."""

    def __init__(self, model: PreTrainedModel) -> None:
        parts = modules_of(model)
        self.switches = switches()
        self.spaces = [Together([*plain_spaces(model, parts)]), *spaces_of(model, parts)]
        places = [
            (getattr(part, container), name) for part in parts for container in (PARAMETERS, BUFFERS)
            for name in getattr(part, container)
        ]  # fmt: skip
        self.weights = [(container, name) for container, name in places if container[name] is not None]
        self.empty = [(container, name) for container, name in places if container[name] is None]
        first: dict[int, int] = {}
        held = self.tensors()
        self.twins = [first.setdefault(id(tensor), place) for place, tensor in enumerate(held)]
        self.single = [*first.values()]
        self.fit = as_they_are([held[place] for place in self.single])
        with torch.inference_mode():  # where operators are dispatched otherwise on the same tensors
            self.fit_in_inference = as_they_are([held[place] for place in self.single])

    def tensors(self) -> list[Tensor]:
        return [container[name] for container, name in self.weights]

    def still(self) -> bool:
        """Whether it is so now."""
        try:
            held = self.tensors()
            if any(container[name] is not None for container, name in self.empty):
                return False
        except KeyError:
            return False
        fit = self.fit_in_inference if torch.is_inference_mode_enabled() else self.fit
        return (
            all(space.is_same() for space in self.spaces)
            and all(tensor is held[twin] for tensor, twin in zip(held, self.twins, strict=True))
            and fit(*(held[place] for place in self.single))
            and switches() == self.switches
        )


def switches() -> str:
    """torch's own switches that graphs depend on, as Dynamo asks for them; but not how many threads there are, which
    a package asks itself."""
    known = json.loads(switches_of_torch())
    known.pop("num_threads", None)
    return json.dumps(known, sort_keys=True)


def modules_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose code is in a prefill's graph, the model itself last."""
    return [*dict.fromkeys(part for _, part in graph_modules(model)), model]


def spaces_of(model: PreTrainedModel, parts: Sequence[nn.Module]) -> Iterator[Told | Functions]:
    """The model and its body, to which calls add; classes; files; tables of attentions."""
    for part in dict.fromkeys((model, model.base_model)):
        yield Told(vars(part), ignored_of(part))
    for kind in dict.fromkeys(each for part in parts for each in type(part).__mro__[:-1]):
        yield Told(vars(kind), is_special)
    for name in {type(part).__module__ for part in parts}:
        yield Functions(vars(sys.modules[name]))
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        yield Functions(table)


def plain_spaces(model: PreTrainedModel, parts: Sequence[nn.Module]) -> Iterator[Any]:
    """Attributes of modules, and what these hold that can be changed in place."""
    seen: set[int] = set()
    for part in parts:
        if part is not model and part is not model.base_model:
            yield vars(part)
        for name, value in vars(part).items():
            if part is model and name not in (MODULES, PARAMETERS, BUFFERS, "config"):
                continue
            if name in (PARAMETERS, BUFFERS):
                yield value.keys()  # the tensors may be others
            elif name not in (*OF_CALLS, *OURS):
                yield from nested(value, seen)


def nested(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value, and what it holds, that can be changed in place: dictionaries, lists, sets and configurations."""
    if id(value) in seen:
        return
    if isinstance(value, (dict, list, set)):
        yield value
        inside = [*value.values()] if isinstance(value, dict) else [*value]
    elif isinstance(value, tuple):
        inside = [*value]
    elif isinstance(value, PretrainedConfig):
        yield vars(value)
        inside = [*vars(value).values()]
    else:
        return
    seen.add(id(value))
    for each in inside:
        yield from nested(each, seen)


def ignored_of(part: nn.Module) -> Callable[[str], bool]:
    """Which attributes of a model, or of its body, say nothing: those of calls, ours, and new ones by which no code of
    its class is told from others."""
    before = {*vars(part)}

    def ignored(name: str) -> bool:
        if name in OF_CALLS or name in OURS:
            return True
        return name not in before and not hasattr(type(part), name)

    return ignored


def is_special(name: str) -> bool:
    """Names that Python, or Dynamo, adds to a class when it is asked for them."""
    return name.startswith("__") and name not in ("__call__", "__getattr__")
