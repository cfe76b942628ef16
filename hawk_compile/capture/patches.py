"""What is put on a model so that its forward can be captured as one graph.

Whether a graph is captured is asked of this thread: `torch.compiler.is_compiling` says what any thread of the process
does, and what stands in would then run in a call that is not captured.
"""

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import let_recorders_ask

exports = threading.local()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """torch.export runs the model's code in this thread, where Dynamo's own mark does not show."""
    try:
        exports.running = True
        yield
    finally:
        exports.running = False


def is_captured() -> bool:
    """Whether the code that asks is being captured: by Dynamo, for which this is a constant, or by an export."""
    return torch.compiler.is_dynamo_compiling() or getattr(exports, "running", False)


class RecordedByThread(WhileUsed):
    """Lets transformers record hidden states in each thread's own place while another thread captures.

    It records in one place of the process where it believes to be captured, which it asks of the whole process: two
    threads that encode images by hidden states, as LLaVA does, would get each other's features while a third compiles.
    Captured code is as before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked_before: Callable[[], bool] | None = None

    def change(self) -> None:
        if self.asked_before is None:
            self.asked_before = let_recorders_ask(is_captured)

    def undo(self) -> None:
        if self.asked_before is None:
            return
        others = let_recorders_ask(self.asked_before)
        if others is not is_captured:
            let_recorders_ask(others)
        self.asked_before = None


recorded_by_thread = RecordedByThread()


def definer(kind: Any, name: str) -> Any:
    """The class that defines a method: others that a module is given later (FSDP, parametrisations) are behind it."""
    return next((each for each in inspect.getmro(kind) if name in vars(each)), kind)


@functools.cache
def placeholder_mask_of(kind: Any) -> Callable[..., Any]:
    """`get_placeholder_mask` of a class; while a graph is captured, without the features that serve its check alone.

    Some compare the numbers by an `if`, which no graph can take. What the method can do without, the mask does not
    need.
    """
    original: Callable[..., Any] = kind.get_placeholder_mask
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)[1:]
    checked = tuple(name for name in names if name.endswith("features") and parameters[name].default is None)

    def get_placeholder_mask(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_captured():
            return original(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        return original(self, **{name: value for name, value in given.items() if name not in checked})

    return get_placeholder_mask


@functools.cache
def audio_features_of(kind: Any) -> Callable[..., Any]:
    """`get_audio_features` of a class; while a graph is captured, its first argument is encoded already, [V, D]."""
    original: Callable[..., Any] = kind.get_audio_features
    first = list(inspect.signature(original).parameters)[1]

    def get_audio_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_captured():
            return original(self, *args, **kwargs)
        features = args[0] if args else kwargs[first]
        return BaseModelOutputWithPooling(pooler_output=features, last_hidden_state=features)

    return get_audio_features


def body_overrides(model: PreTrainedModel) -> dict[str, types.MethodType]:
    """The methods to put on the model's body, of those that it has."""
    base = model.base_model
    kind: Any = type(base)
    methods: list[Callable[..., Any]] = []
    if hasattr(kind, "get_placeholder_mask"):
        methods.append(placeholder_mask_of(definer(kind, "get_placeholder_mask")))
    if hasattr(kind, "get_audio_features"):
        methods.append(audio_features_of(definer(kind, "get_audio_features")))
    return {method.__name__: types.MethodType(method, base) for method in methods}


def put_on_body(model: PreTrainedModel) -> None:
    """Put these on a body that took the place of the one that was optimised; what lies there stays."""
    for name, method in body_overrides(model).items():
        model.base_model.__dict__.setdefault(name, method)


@contextlib.contextmanager
def overridden(model: PreTrainedModel) -> Iterator[None]:
    """Put on the methods of a body inside, whether the model is optimised and has them, or not."""
    body = model.base_model.__dict__
    overrides = body_overrides(model)
    before = {name: body[name] for name in overrides if name in body}
    try:
        body.update(overrides)
        yield
    finally:
        for name in overrides:
            body.pop(name, None)
        body.update(before)


def install_recorders(module: nn.Module) -> None:
    """Put on the hooks that record hidden states: a model does so at its first such call, under a lock, which no graph
    can take."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            maybe_install_capturing_hooks(part)
