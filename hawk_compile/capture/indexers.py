"""Indexers that choose keys query by query, by data: one operator in the graph instead of the loop.

A sparse attention's indexer says which keys each query may see. Where it looks for them in a loop over rows and
queries, whose length and numbers are data, no graph can take it. As an operator it is opaque: what it runs is the
model's own forward, so numerics are the model's. Only the keys that it remembers pass by the operator, since a cache is
written by the graph itself.

The class belongs to a modeling file, so what stands in for its forward is seen by every model of that file. It makes a
difference only to what Dynamo captures without gradients, and goes with the last model that needs it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hawk_compile.capture.twin import with_tensors
from hawk_compile.capture.while_used import WhileUsed

ARGUMENTS = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values"]
"""How transformers calls an indexer: tokens [B, S, D], rotary tables of all keys [B, P + S, d] twice, the mask
[B, 1, S, P + S] and the cache."""
LOOKS_FOR_DATA = frozenset({"nonzero", "update_indexer"})
"""What the code of an indexer names that picks keys by data and remembers its own."""

originals: dict[Any, Callable[..., Tensor]] = {}
"""The classes' own forwards."""
shells: dict[str, tuple[nn.Module, list[str]]] = {}
"""Indexers without their weights, and the names of these, by all that tells them from others of their class."""


class Remembered:
    """Stands for the cache inside of the operator: what the indexer adds is kept apart, what it reads is as in one."""

    def __init__(self, past: Tensor | None):
        self.past = past
        self.added: Tensor | None = None

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        self.added = keys
        return keys if self.past is None else torch.cat([self.past, keys], dim=1)


@torch.library.custom_op("hawk::choose_keys", mutates_args=())
def choose_keys(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor | None, weights: list[Tensor],
    indexer: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which keys each query may see, bool like the mask [B, 1, S, P + S], and what the indexer remembers [B, S, d].

    Args:
        past: [B, P, d] that it remembers; None if nothing.
        weights: of the indexer, in the order of their names.
        indexer: one of `shells`.
    """
    remembered = Remembered(past)
    chosen = run(indexer, weights, hidden_states, (cos, sin), attention_mask, remembered)
    assert remembered.added is not None
    return chosen.contiguous(), remembered.added.clone(memory_format=torch.contiguous_format)


@choose_keys.register_fake
def _(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor | None, weights: list[Tensor],
    indexer: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, length = hidden_states.shape[:2]
    one = [each.new_empty((1, 1, each.shape[2])) for each in (hidden_states, cos, sin)]
    try:
        run(indexer, weights, one[0], (one[1], one[2]), attention_mask.new_empty((1, 1, 1, 1)), AsksOnly())
    except KeysSeen as seen:
        added = seen.keys.new_empty((rows, length, seen.keys.shape[2]))
    chosen = attention_mask.new_empty((rows, 1, length, attention_mask.shape[3]), dtype=torch.bool)
    return chosen, added


class KeysSeen(Exception):
    """Ends an indexer that is only asked what it remembers: what follows needs data."""

    def __init__(self, keys: Tensor):
        self.keys = keys


class AsksOnly(Remembered):
    """A cache for an indexer of one token, which is asked for no more than the shape of its keys."""

    def __init__(self) -> None:
        super().__init__(None)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        raise KeysSeen(keys)


def run(indexer: str, weights: list[Tensor], *args: Any) -> Tensor:
    """The own forward of an indexer that has these weights."""
    shell, names = shells[indexer]
    module = with_tensors(shell, dict(zip(names, weights, strict=True)))
    return originals[type(shell)](module, *args)


def stand_in(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor,
        past_key_values: Any,
    ) -> Tensor:  # fmt: skip
        if not torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
            return original(self, hidden_states, position_embeddings, attention_mask, past_key_values)
        weights = [weight_of(self, name) for name in names_of_weights(self).split(",")]
        past = None if past_key_values is None else past_key_values.layers[self.layer_idx].indexer_keys
        chosen, added = torch.ops.hawk.choose_keys(
            hidden_states, *position_embeddings, attention_mask, past, weights, name_of_shell(self))
        if past_key_values is not None:
            past_key_values.update_indexer(added, self.layer_idx)
        return chosen

    return forward


def weight_of(module: Any, path: str) -> Tensor:
    for name in path.split("."):
        module = getattr(module, name)
    return module  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result
def names_of_weights(indexer: nn.Module) -> str:
    return ",".join(name for name, _ in indexer.named_parameters())


@torch.compiler.assume_constant_result
def name_of_shell(indexer: nn.Module) -> str:
    """What tells an indexer from others of its class, with which it is run; graphs of equal ones are equal."""
    settings = {
        name: value for name, value in vars(indexer).items()
        if isinstance(value, (bool, int, float, str)) and name != "layer_idx"
    }  # fmt: skip
    kind = type(indexer)
    name = f"{kind.__module__}.{kind.__qualname__}({settings}, {dict(indexer.named_children())})"
    if name not in shells:
        shells[name] = with_tensors(indexer, {}), names_of_weights(indexer).split(",")
    return name


def picks_keys_by_data(module: nn.Module) -> bool:
    """Whether a module is such an indexer, and nothing but its weights tells two of them apart."""
    kind: Any = type(module)
    return looks_for_data(kind) and not dict(module.named_buffers())


@functools.cache
def looks_for_data(kind: Any) -> bool:
    forward = inspect.unwrap(kind.forward)
    names = set(getattr(getattr(forward, "__code__", None), "co_names", ()))
    return names >= LOOKS_FOR_DATA and list(inspect.signature(forward).parameters) == ARGUMENTS


class IndexersStoodFor(WhileUsed):
    """Lets what is captured of models hold an operator for indexers that pick keys by data."""

    def __init__(self) -> None:
        super().__init__()
        self.stand_ins: dict[Any, Callable[..., Tensor]] = {}
        """By class; always the same, since what was captured is guarded by them."""

    def change(self, model: nn.Module | None = None) -> None:
        """For a model's indexers; none for a copy of a model that has them already."""
        for kind in {type(each) for each in model.modules() if picks_keys_by_data(each)} if model is not None else ():
            if kind not in self.stand_ins:
                originals[kind] = kind.forward
                self.stand_ins[kind] = stand_in(kind.forward)
            if kind.forward is originals[kind]:
                kind.forward = self.stand_ins[kind]

    def undo(self) -> None:
        for kind, ours in self.stand_ins.items():
            if kind.forward is ours:
                kind.forward = originals[kind]


indexers_stood_for = IndexersStoodFor()
