"""Blocks in which a model prunes: what it was before is what it is again behind, whichever of several ends first."""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.compat.accelerate import FORWARD
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.overrides import attribute_of, overrides_of
from hawk_compile.runtime.split import put_hooks_back
from hawk_compile.runtime.state import REDUCE, RUNTIME, Runtime

MISSING = object()


@dataclass(eq=False)
class Block:
    """What the model's attributes were before a block: (the dictionary that holds one, its name, its value)."""

    before: list[tuple[dict[str, Any], str, Any]]


lock = threading.Lock()
"""Guards `open_blocks`."""
open_blocks: "weakref.WeakKeyDictionary[PreTrainedModel, list[Block]]" = weakref.WeakKeyDictionary()
"""The blocks that a model is inside of, outermost first."""
entered: ContextVar[tuple[Block, ...]] = ContextVar("hawk_blocks", default=())
"""The blocks that this thread, or this task of one, is inside of."""


@contextlib.contextmanager
def block_of(model: PreTrainedModel) -> Iterator[None]:
    """Behind it the model is what it was before.

    Raises:
        UnsupportedCallError: the model is inside a block that somebody else has entered.
    """
    block, blocks = Block([]), list[Block]()
    try:  # from here on: an interruption may come between any two instructions
        with lock:
            blocks = open_blocks.setdefault(model, [])
            if blocks and blocks[-1] not in entered.get():
                raise UnsupportedCallError(
                    "another thread or task is inside a `pruned` block with this model, whose settings would be those "
                    "of this block too: enter one block around both, or give each a model of its own"
                )
            block.before = attributes_of(model)
            blocks.append(block)
        entered.set((*entered.get(), block))
        yield
    finally:
        entered.set(tuple(other for other in entered.get() if other is not block))
        with lock:
            if block in blocks:
                leave(model, blocks, block)


def attributes_of(model: PreTrainedModel) -> list[tuple[dict[str, Any], str, Any]]:
    places = [(owner.__dict__, attribute_of(name)) for name, (owner, _) in overrides_of(model).items()]
    places += [(owner, FORWARD) for owner in {id(held): held for held, name in places if name == "forward"}.values()]
    places += [(model.__dict__, RUNTIME), (model.__dict__, REDUCE), (model.base_model.__dict__, "rope_deltas")]
    return [(held, name, held.get(name, MISSING)) for held, name in places]


def leave(model: PreTrainedModel, blocks: list[Block], block: Block) -> None:
    """End a block. One that began inside of it and goes on returns, when it ends, to what was before this one."""
    place = blocks.index(block)
    inner = blocks[place + 1 :]
    del blocks[place]
    if inner:
        inner[0].before = block.before
        return
    runtime: Runtime | None = model.__dict__.get(RUNTIME)
    for held, name, value in block.before:
        if value is MISSING:
            held.pop(name, None)
        else:
            held[name] = value
    if RUNTIME not in model.__dict__:
        put_hooks_back(model)
    if runtime is not None and runtime is not model.__dict__.get(RUNTIME):
        runtime.put_aside(model)
