"""Token mixers that work chunk by chunk or token by token: one operator in the graph instead of a loop of one length.

Where no kernel is installed, transformers runs the chunked delta rule and its like by a loop in Python over S / 64
chunks, and selective scans by one over S tokens. Captured as it is, the graph would serve prompts of that length only;
and behind the cut, where the prompt is shorter, it would have more turns than chunks. As an operator it has no loop.
What the operator runs is the model's own function, kernel or not: numerics are the model's.

These functions belong to modeling files, so what stands in for one is seen by every model of that file. It does what
the function does, makes a difference only to what is captured without gradients, and goes with the last model that
needs it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.capture.patches import is_captured
from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import MIXERS, Mixer

TENSOR = "<tensor>"
"""Stands for a tensor among a call's values."""
ROWS, LENGTH = "rows", "length"
"""Stand for B and S among sizes."""
PROBES = ((2, 3), (4, 3), (2, 5))
"""(B, S) at which a mixer is asked for the shapes of its results: what changes with the rows is B, with the length
S."""
STATE = "initial_state"
"""How the names of arguments begin that are [B, H, ...], without a length."""

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """A call of a mixer, apart from its tensors.

    Attributes:
        mixer: the dotted path of the function.
        names: of its arguments, in order.
        values: one for each name; TENSOR for those that are tensors.
    """

    mixer: str
    names: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def kind(self) -> Mixer:
        return MIXERS[self.mixer.rpartition(".")[2]]

    @property
    def tensors(self) -> list[str]:
        """The names of arguments that are tensors."""
        return [name for name, value in zip(self.names, self.values, strict=True) if value == TENSOR]

    def arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        remaining = iter(tensors)
        pairs = zip(self.names, self.values, strict=True)
        return {name: next(remaining) if value == TENSOR else value for name, value in pairs}

    def shapes(self, tensors: Sequence[Tensor]) -> tuple[Shape, ...]:
        """The tensors' shapes, with ROWS and LENGTH for B and S."""
        tokens = self.kind.tokens
        return tuple(
            tuple(tensor.shape) if tensor.ndim < 3
            else (ROWS, *tensor.shape[1:]) if name.startswith(STATE)
            else (ROWS, *tensor.shape[1:tokens], LENGTH, *tensor.shape[tokens + 1:])
            for name, tensor in zip(self.tensors, tensors, strict=True)
        )  # fmt: skip


originals: dict[str, Callable[..., Any]] = {}
"""The modeling files' own functions, by their dotted path."""
calls: dict[str, Call] = {}
"""The calls that graphs hold, by what they are called there."""
results: dict[Any, list[tuple[Shape, torch.dtype]]] = {}
"""Shapes and dtypes of what a call returns, by the call and by the shapes and dtypes of its tensors."""


@torch.library.custom_op("hawk::mix_chunks", mutates_args=())
def mix_chunks(tensors: list[Tensor], call: str) -> list[Tensor]:
    """A mixer's results: mixed tokens, as [B, S, H, d] or [B, D, S], and the state behind the last one, [B, H, ...].

    Args:
        tensors: in the order of the mixer's arguments; the first is of tokens.
        call: one of `calls`.
    """
    asked = calls[call]
    returned = originals[asked.mixer](**asked.arguments(tensors))
    # A kernel may return another dtype than the function that it replaces, which the graph was made for.
    expected = results_of(call, tensors)
    return [
        result.to(dtype).clone(memory_format=torch.contiguous_format)
        for result, (_, dtype) in zip(returned, expected, strict=True)
    ]


@mix_chunks.register_fake
def _(tensors: list[Tensor], call: str) -> list[Tensor]:
    rows, length = tensors[0].shape[0], tensors[0].shape[calls[call].kind.tokens]
    return [
        tensors[0].new_empty(sized(shape, rows, length), dtype=dtype)
        for shape, dtype in results_of(call, tensors)
    ]


def results_of(name: str, tensors: Sequence[Tensor]) -> list[tuple[Shape, torch.dtype]]:
    """Shape and dtype of each result, found by trying the function without kernel at small sizes."""
    call = calls[name]
    shapes, dtypes = call.shapes(tensors), tuple(tensor.dtype for tensor in tensors)
    key = (name, shapes, dtypes)
    if key not in results:
        function = inspect.unwrap(originals[call.mixer])
        probes = []
        for sizes in PROBES:
            small = [tensor.new_empty(sized(shape, *sizes)) for tensor, shape in zip(tensors, shapes, strict=True)]
            probes.append(function(**call.arguments(small)))
        results[key] = [
            (
                tuple(
                    ROWS if more_rows != size else LENGTH if longer != size else size
                    for size, more_rows, longer in zip(*(result.shape for result in same), strict=True)
                ),
                same[0].dtype,
            )
            for same in zip(*probes, strict=True)
        ]
    return results[key]


def sized(shape: Shape, rows: Any, length: Any) -> list[Any]:
    return [rows if size == ROWS else length if size == LENGTH else size for size in shape]


def stand_in(path: str, original: Callable[..., Any], kind: Mixer) -> Callable[..., Any]:
    """What stands in for a mixer."""
    names = tuple(inspect.signature(inspect.unwrap(original)).parameters)

    @functools.wraps(original)
    def mixer(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not is_captured():
            return original(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **{name: kwargs[name] for name in kwargs if name in names}}
        given |= kind.fixed
        asked, given[kind.asks] = given.get(kind.asks), True
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        values = tuple(TENSOR if isinstance(value, Tensor) else value for value in given.values())
        mixed, state = torch.ops.hawk.mix_chunks(tensors, name_of_call(path, tuple(given), values))
        return (mixed, state) if asked else mixed if kind.alone else (mixed, None)

    return mixer


@torch.compiler.assume_constant_result
def name_of_call(path: str, names: tuple[str, ...], values: tuple[Any, ...]) -> str:
    call = Call(path, names, values)
    name = f"{path}({', '.join(f'{key}={value!r}' for key, value in zip(names, values, strict=True))})"
    calls[name] = call
    return name


class MixersStoodFor(WhileUsed):
    """Lets what is captured of models hold an operator for each chunked mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.stand_ins: dict[str, Callable[..., Any]] = {}
        """By the mixers' dotted paths; always the same, since what was captured is guarded by them."""

    def change(self, model: nn.Module) -> None:
        """For a model's modeling files."""
        for name in {type(module).__module__ for module in model.modules()}:
            file = sys.modules.get(name)
            for mixer, kind in MIXERS.items():
                path, there = f"{name}.{mixer}", getattr(file, mixer, None)
                if callable(there) and there is not self.stand_ins.get(path):
                    if originals.get(path) is not there:
                        originals[path], self.stand_ins[path] = there, stand_in(path, there, kind)
                    setattr(file, mixer, self.stand_ins[path])

    def undo(self) -> None:
        for path, ours in self.stand_ins.items():
            name, _, mixer = path.rpartition(".")
            file = sys.modules.get(name)
            if getattr(file, mixer, None) is ours:
                setattr(file, mixer, originals[path])


mixers_stood_for = MixersStoodFor()
