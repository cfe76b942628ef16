"""What a pruned model must keep: scores worked out by hand from what the plain model's attention compares.

Nothing here knows a model, nor how positions are found in graphs. The plain model runs with every angle of its rotary
embedding at zero, where rotating changes nothing, so that the queries and keys which its attention receives are those
before position. Whether they are is held to, too: the same vector in every place must then be the same query and key.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hawk_compile.tools.survey.oracle import changed, layers_of
from hawk_compile.tools.survey.outcome import Unasked

COSINES, SINES = (torch.cos, Tensor.cos), (torch.sin, Tensor.sin)
FACTORS = (torch.mul, Tensor.mul, Tensor.__mul__)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
ROUNDING = 1e-5


@dataclass(frozen=True)
class Compared:
    """What an attention compares in one row: queries [H, S, d], and keys [H, S, d], one for each query head."""

    query: Tensor
    key: Tensor


class Watching(TorchFunctionMode):
    """Lets every angle be zero, and notes what attention over a prompt compares while `inside` is set."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.inside = length, False
        self.tables: list[Tensor] = []
        self.by_operator: list[tuple[Tensor, Tensor]] = []
        self.by_steps: list[tuple[Tensor, Tensor]] = []
        self.product: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (table := self.table(func, args)) is not None:
            self.tables.append(table)
            return table
        result = func(*args, **(kwargs or {}))
        if self.inside:
            self.note(func, args, kwargs or {}, result)
        return result

    def table(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
        """A rotary table at angles of zero, which a factor that comes with the rotation (as YaRN's) leaves as it is."""
        if func in COSINES:
            return torch.ones_like(args[0])
        if func in SINES:
            return torch.zeros_like(args[0])
        if func is torch.polar:
            return torch.polar(torch.ones_like(args[1]), torch.zeros_like(args[1]))
        is_scaled = func in FACTORS and isinstance(args[1], float) and any(args[0] is table for table in self.tables)
        return args[0] if is_scaled else None

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func is functional.scaled_dot_product_attention:
            query, key = (args[at] if len(args) > at else kwargs[name] for at, name in enumerate(("query", "key")))
            if query.ndim == 4 and query.shape[-2] == key.shape[-2] == self.length:
                self.by_operator.append((query, key))
        elif func in PRODUCTS and result.shape[-2:] == (self.length, self.length) and result.ndim == 4:
            self.product = args[0], args[1].mT
        elif func in SOFTMAX and self.product is not None and args[0].ndim == 4:
            self.by_steps.append(self.product)


def compared(model: PreTrainedModel, inputs: dict[str, Any], layer: int) -> Compared:
    """What the attention of a decoder layer compares before position enters, in the plain model.

    Args:
        inputs: of one row.
        layer: counted from 0.

    Raises:
        Unasked: it attends in a way that is not seen, or position is in there all the same.
    """
    part = layers_of(model)[layer]
    stream = stream_into(model, part, inputs)
    seen = attended(model, part, inputs, stream)
    last = stream.narrow(stream.shape.index(inputs["input_ids"].shape[1]), -1, 1)
    everywhere = attended(model, part, inputs, last.expand_as(stream).contiguous())
    behind = seen.query.shape[1] // 2  # the first places have fewer neighbours for what mixes these (convolutions)
    for name, value in (("queries", everywhere.query), ("keys", everywhere.key)):
        later = value[:, behind:]
        if not torch.allclose(later, later[:, -1:].expand_as(later), rtol=ROUNDING, atol=ROUNDING):
            raise Unasked(f"position is in {name} otherwise than by an angle, so they cannot be had without it")
    return seen


def stream_into(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The residual stream, of S vectors or more for each, in front of a layer."""
    seen: list[Tensor] = []

    def look(kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(next(iter(kwargs.values())))
        return kwargs

    with torch.no_grad(), changed(layer, look):
        model(**inputs)
    return seen[0]


def attended(model: PreTrainedModel, layer: nn.Module, inputs: dict[str, Any], stream: Tensor) -> Compared:
    """What a layer's attention compares at angles of zero where this stream enters it."""
    watching = Watching(inputs["input_ids"].shape[1])

    def enter(kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs | {next(iter(kwargs)): stream}

    with torch.no_grad(), changed(layer, enter), inside(layer, watching), watching:
        model(**inputs)
    pairs = watching.by_operator or watching.by_steps
    if not pairs:
        raise Unasked("the layer that scores attends neither by one operator nor by a softmax of one product")
    query, key = pairs[0]
    return Compared(query[0], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0))


@contextlib.contextmanager
def inside(layer: nn.Module, watching: Watching) -> Iterator[None]:
    """Let what watches know when a layer runs."""

    def enter(*_: Any) -> None:
        watching.inside = True

    def leave(*_: Any) -> None:
        watching.inside = False

    handles = layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scored(seen: Compared, visual: Tensor, question: Tensor) -> Tensor:
    """HAWK's score [V] of each visual token with equal weights of heads, in float64 (arXiv 2604.07812, section 3).

    Args:
        visual: [S] bool.
        question: [S] bool: the tokens that vote.
    """
    query, key = seen.query.double()[:, question], seen.key.double()[:, visual]  # [H, T, d], [H, V, d]
    relevance = (query @ key.mT).mean(1) / math.sqrt(query.shape[-1])  # [H, V]: every token's own, then their mean
    return (relevance / relevance.norm(dim=1, keepdim=True)).mean(0)
