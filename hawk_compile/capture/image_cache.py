"""Encoded images that are kept for later calls that hold the same ones: so many bytes of them, the last used stay."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.encoder_numbers import NotKept
from hawk_compile.capture.encoder_state import Structure

STRUCTURES = 4
"""What an encoder may go back to (an adapter taken off and put on) and find what it made."""


@dataclass(frozen=True)
class ImageCacheUse:
    """What came of a model's `image_cache` so far.

    Attributes:
        hits: images that were not encoded, since they were before.
        misses: images that were encoded and looked for in vain.
        passed_over: images that were encoded without being looked for, or not kept.
        reason: why the last of those was; "" where there is none.
        images: how many are kept. bytes: how large they are, of `limit` at most.
    """

    hits: int
    misses: int
    passed_over: int
    reason: str
    images: int
    bytes: int
    limit: int


class ImageCache:
    """Outputs of an encoder by what they are of. Nothing that is kept is ever written to; what is given is a copy.

    Attributes:
        limit: bytes of tensors that are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        """Guards all below; it is held while nothing is encoded, hashed or copied."""
        self.outputs: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.structures: OrderedDict[int, Structure] = OrderedDict()
        self.size = self.made = self.hits = self.misses = self.passed_over = 0
        self.reason = ""

    def structure_of(self, model: PreTrainedModel) -> tuple[int, Structure]:
        """What the model's encoder is now, and its number.

        Raises:
            NotKept: it holds more than can be looked at.
        """
        with self.lock:
            known = [*self.structures.items()]
        for number, structure in reversed(known):
            if structure.holds(model):
                with self.lock:
                    if number in self.structures:
                        self.structures.move_to_end(number)
                return number, structure
        structure = Structure(model)
        with self.lock:
            self.made += 1
            self.structures[self.made] = structure
            if len(self.structures) > STRUCTURES:
                gone, _ = self.structures.popitem(last=False)
                for key in [key for key in self.outputs if key[0] == gone]:  # type: ignore[index]
                    self.size -= self.outputs.pop(key)[1]
            return self.made, structure

    def get(self, key: Hashable) -> Any:
        """A copy of what is kept; None if nothing is."""
        with self.lock:
            output, _ = self.outputs.get(key, (None, 0))
            if output is None:
                self.misses += 1
                return None
            self.hits += 1
            self.outputs.move_to_end(key)
        return copied(output)

    def count_hit(self) -> None:
        with self.lock:
            self.hits += 1

    def put(self, key: Hashable, output: Any) -> None:
        """Keep a copy of an output, and let go of what was not used for longest.

        Raises:
            NotKept: it is larger than all that may be kept, or holds what cannot be copied.
        """
        size = size_of(output)
        if size > self.limit:
            raise NotKept(f"one takes {size:,} bytes, and image_cache is {self.limit:,}: give more")
        with torch.inference_mode(False), torch.no_grad():
            output = copied(output)
        with self.lock:
            self.size -= self.outputs.pop(key, (None, 0))[1]
            self.outputs[key] = (output, size)
            self.size += size
            while self.size > self.limit:
                self.size -= self.outputs.popitem(last=False)[1][1]

    def pass_over(self, images: int, reason: str) -> None:
        with self.lock:
            self.passed_over += images
            self.reason = reason

    def use(self) -> ImageCacheUse:
        with self.lock:
            return ImageCacheUse(
                self.hits, self.misses, self.passed_over, self.reason, len(self.outputs), self.size, self.limit
            )


def copied(value: Any) -> Any:
    """An encoder's output whose tensors are its own.

    Raises:
        NotKept: it holds something else than tensors and plain values.
    """
    if type(value) is Tensor:
        return value.clone()
    if isinstance(value, ModelOutput):
        return type(value)(**{name: copied(held) for name, held in value.items()})
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    if value is None or type(value) in (int, float, bool, str):
        return value
    raise NotKept(f"its encoder gives a {type(value).__name__}")


def size_of(value: Any) -> int:
    """Bytes of the tensors in an output."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    held = value.values() if isinstance(value, ModelOutput) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(size_of, held))
