"""Who waits for whom: only the first calls of a compiled function take turns.

Dynamo's settings are each thread's own (`torch._dynamo.config.patch`), and Dynamo compiles one function at a time. What
the lock guards is the code of the models, which an export changes for the whole process while it traces: a call that
has to be captured waits for it. It also lets threads that meet a new structure at once share one compilation.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hawk_compile.capture.dynamo import capture_lock, capture_settings


class Turns:
    """First calls of each structure one at a time, all others side by side."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()

    @contextlib.contextmanager
    def taking(self, *arguments: Any) -> Iterator[None]:
        """Around a call with these arguments; Dynamo's settings are those of a capture inside."""
        structure = (structure_of(arguments), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        first = structure not in self.seen
        with capture_lock if first else contextlib.nullcontext(), capture_settings():
            yield
        self.seen.add(structure)


def structure_of(value: Any) -> Any:
    """What two calls share that one compiled graph serves, as far as it can be seen cheaply.

    It need not be exact: where it is too coarse, two threads may compile the same; too fine, one waits for another.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(size == 1 for size in value.shape)
    if isinstance(value, Mapping):
        return tuple((name, structure_of(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(structure_of(part) for part in value)
    if isinstance(value, Cache):
        return type(value), len(value.layers), value.is_initialized
    return value if isinstance(value, (bool, str)) else type(value)
