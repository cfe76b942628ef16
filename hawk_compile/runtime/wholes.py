"""Omni models, which hand the prompt on to a whole vision-language model inside them and go on from its text: that part
is optimised in their place."""

import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.capture.modalities import takes
from hawk_compile.capture.patches import definer
from hawk_compile.compat.models import UPLOAD
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.parts import class_of, generating_parts, goes_around_forward
from hawk_compile.runtime.saving import save_of, upload
from hawk_compile.runtime.state import PART
from hawk_compile.settings.checkpoint import name_checkpoint
from hawk_compile.settings.config import MODALITIES

HIDDEN_STATES = "output_hidden_states"


def whole_part(model: Any) -> tuple[str, PreTrainedModel] | None:
    """The part of an omni model that is a whole vision-language model: (its name, itself); None of other models."""
    if not isinstance(model, PreTrainedModel) or not goes_around_forward(class_of(model)):
        return None
    if any(takes(model, modality) for modality in MODALITIES):
        return None
    parts = generating_parts(model)
    inner = next(((name, part) for name, part in parts if any(takes(part, each) for each in MODALITIES)), None)
    if inner is not None:
        name_checkpoint(inner[1], model)
    return inner


def pruned_part(model: Any) -> Any:
    """What prunes where a model is optimised: the model itself, or the part of an omni model."""
    inner = whole_part(model)
    return model if inner is None else inner[1]


whole: ContextVar[str | None] = ContextVar("hawk_whole", default=None)
"""Inside the generate of an omni model that nobody has asked for hidden states: the name of its class."""


@functools.cache
def generate_of_whole(kind: Any) -> Callable[..., Any]:
    """generate of an omni model, whose part learns that it is called by it."""
    plain: Callable[..., Any] = kind.generate

    @functools.wraps(plain)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        asked = any(name.endswith(HIDDEN_STATES) and value for name, value in kwargs.items())
        before = whole.get()
        try:
            whole.set(None if asked else type(self).__name__)
            return plain(self, *args, **kwargs)
        finally:
            whole.set(before)

    return generate


def overrides_of_whole(model: PreTrainedModel) -> dict[str, types.MethodType]:
    """Each attribute that an omni model shadows while its part is optimised."""
    kind = class_of(model)
    made = {
        "generate": generate_of_whole(definer(kind, "generate")),
        "save_pretrained": save_of(definer(kind, "save_pretrained")), UPLOAD: upload,
    }  # fmt: skip
    return {name: types.MethodType(function, model) for name, function in made.items()}


def hold(model: PreTrainedModel, name: str) -> None:
    """Note which part prunes in a model's place."""
    model.__dict__.update({PART: name, **overrides_of_whole(model)})


def let_go(model: PreTrainedModel) -> PreTrainedModel | None:
    """Undo `hold`; the part, or None where none was held."""
    name = model.__dict__.pop(PART, None)
    if name is None:
        return None
    for attribute, method in overrides_of_whole(model).items():
        if getattr(model.__dict__.get(attribute), "__func__", None) is method.__func__:
            del model.__dict__[attribute]
    return getattr(model, name)  # type: ignore[no-any-return]


def refuse_speech(kwargs: dict[str, Any]) -> None:
    """Refuse to prune what an omni model goes on to make speech from.

    Raises:
        UnsupportedCallError: it asks its part for the hidden states of the prompt.
    """
    name = whole.get()
    if name is not None and kwargs.get(HIDDEN_STATES):
        raise UnsupportedCallError(
            f"{name} makes speech from the hidden states of every token of the prompt, of which a pruned prefill has "
            'those that it kept only: ask for text alone (generation_mode="text"), or hawk_compile.restore the model'
        )
