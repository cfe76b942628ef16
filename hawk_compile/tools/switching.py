"""One model under several settings in turn, and as it was after them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.runtime.api import optimize, restore
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.settings.config import HawkConfig

Switch = Callable[[HawkConfig | None], None]


def images_of(model: PreTrainedModel, config: HawkConfig) -> ImageCache | None:
    """What keeps encoded images while a model is under several settings: the model's own, or one by these settings."""
    runtime = model.__dict__.get(RUNTIME)
    if runtime is not None and runtime.images is not None:
        return runtime.images  # type: ignore[no-any-return]
    return None if config.image_cache_bytes is None else ImageCache(config.image_cache_bytes)


@contextlib.contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[Switch]:
    """A function that sets the settings (None: no pruning) but for `image_cache`, and keeps what it compiled; all is
    undone after it."""
    base: Any = model.base_model
    earlier, training = model.__dict__.get(RUNTIME), [module for module in model.modules() if module.training]
    images = None if earlier is None else earlier.images
    deltas = getattr(base, "rope_deltas", None)
    compiled: dict[int, Any] = {}  # by the prefill that they share

    def switch(config: HawkConfig | None) -> None:
        restore(model)
        if config is None:
            return
        runtime = optimize(model, replace(config, image_cache=None)).__dict__[RUNTIME]
        for other in compiled.values():
            runtime.take_compiled(other)
        compiled[id(runtime.prefill)] = runtime

    model.eval()
    try:
        yield switch
    finally:
        restore(model)
        if earlier is not None:
            optimize(model, earlier.config).__dict__[RUNTIME] = earlier
            earlier.images = images
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = deltas
        for module in training:
            module.training = True
