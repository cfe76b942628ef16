"""Copies and pickles of an optimised model: its settings travel, and what was compiled for it is compiled anew.

pickle, torch.save, the start of a process and copy all ask an object itself how it is taken apart. Ours says: as its
class would have it, without what `optimize` has put on it, and with the settings beside; where it is put together
again, it is optimised by these. Nothing is asked of the model's checkpoint there.
"""

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.capture.operators import begin_operators
from hawk_compile.capture.patches import recorded_by_thread
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.runtime.overrides import attribute_of, overrides_of
from hawk_compile.runtime.shadowing import install
from hawk_compile.runtime.split import adapt
from hawk_compile.runtime.state import PART, REDUCE, RUNTIME, Runtime, ranks_of
from hawk_compile.runtime.wholes import hold, overrides_of_whole
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import HeadWeights

SET = "__setstate__"
"""The attribute by which pickle and copy give a model the attributes that it had."""


@dataclass(frozen=True)
class Luggage:
    """What travels of a `Runtime`.

    Attributes:
        originals: of attributes of the model's parts that were shadowed: what lay there before, by the override's name.
    """

    config: HawkConfig
    head_weights: HeadWeights
    ids: SpecialIds
    originals: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Luggage":
        return replace(self, originals=copy.deepcopy(self.originals, memo))  # settings do not change: copies share them


def let_travel(model: PreTrainedModel) -> None:
    """Let an optimised model, or one of which a part is, be pickled and copied as that."""
    model.__dict__[REDUCE] = types.MethodType(reduce, model)


def let_stay(model: PreTrainedModel) -> None:
    """Undo `let_travel`."""
    if getattr(model.__dict__.get(REDUCE), "__func__", None) is reduce:
        del model.__dict__[REDUCE]


def begun(model: PreTrainedModel, runtime: Runtime) -> Runtime:
    """What a model is to carry, once what its captures need is put on."""
    recorded_by_thread.begin(runtime)
    begin_operators(runtime, model)
    adapt(model, runtime)
    return runtime


def reduce(self: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
    """How an optimised model is taken apart; see `pickle`'s `object.__reduce_ex__`."""
    taken: Any = type(self).__reduce_ex__(self, protocol)
    make, arguments, state, *_ = taken
    runtime, part = self.__dict__.get(RUNTIME), self.__dict__.get(PART)
    plain = without(state, {REDUCE: types.MethodType(reduce, self)}, {})
    luggage = None
    if runtime is not None:
        overrides = overrides_of(self)
        own = {name: method for name, (owner, method) in overrides.items() if owner is self}
        plain = without(plain, own, runtime.originals)
        others = {name: value for name, value in runtime.originals.items() if name not in own}
        luggage = Luggage(runtime.settings, runtime.head_weights, runtime.ids, others)
    if part is not None:
        plain = without(plain, overrides_of_whole(self), {})
    for name in (RUNTIME, PART):
        plain.pop(name, None)
    return waiting, (make, arguments), (plain, luggage, part)


def without(state: dict[str, Any], ours: dict[str, types.MethodType], originals: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a model by name, as they were before ours were put on; what others wrapped around them stays."""
    plain = dict(state)
    for name, method in ours.items():
        if getattr(plain.get(name), "__func__", None) is method.__func__:
            del plain[name]
            if name in originals:
                plain[name] = originals[name]
    return plain


def waiting(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A model without attributes, which waits for them."""
    model = make(*arguments)
    model.__dict__[SET] = types.MethodType(put_together, model)
    return model


def put_together(model: Any, state: tuple[dict[str, Any], Luggage | None, str | None]) -> None:
    """Give a model its attributes, and optimise it by the settings that it had."""
    plain, luggage, part = state
    del model.__dict__[SET]
    type(model).__setstate__(model, plain)
    if luggage is not None:
        forget_pickled_methods(model, luggage.originals)
        originals, _ = install(model, luggage.originals)
        runtime = Runtime(luggage.config, luggage.head_weights, luggage.ids, originals, ranks_of(model))
        model.__dict__[RUNTIME] = begun(model, runtime)
        let_travel(model)
    if part is not None:
        hold(model, part)
        let_travel(model)


def forget_pickled_methods(model: PreTrainedModel, originals: dict[str, Any]) -> None:
    """Take off a model's parts what pickle makes of our methods there: it finds methods by name, and so the class's."""
    for name, (owner, _) in overrides_of(model).items():
        attribute = attribute_of(name)
        there = owner.__dict__.get(attribute)
        if owner is not model and getattr(there, "__func__", None) is getattr(type(owner), attribute, owner):
            if name in originals:
                owner.__dict__[attribute] = originals[name]
            else:
                del owner.__dict__[attribute]
