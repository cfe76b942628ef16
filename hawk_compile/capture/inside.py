"""Which of a model's modules run inside the graph of its prefill."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

Named = Iterable[tuple[str, nn.Module]]


def graph_modules(model: PreTrainedModel, encodes: bool = False) -> Named:
    """The modules that a prefill's graph runs, with their paths: all but the model itself, whose call is around it, and
    the encoders, which run before it.

    Args:
        encodes: whether the graph runs encoders too.
    """
    base: Any = model.base_model
    ends = [base.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    inside = {id(end) for end in ends if end is not None}
    outside = {id(model)}
    if not encodes:
        for child in base.children():
            parts = {id(part) for part in child.modules()}
            outside |= set() if parts & inside else parts
    return ((path, part) for path, part in model.named_modules() if id(part) not in outside)


def shards() -> tuple[type, ...]:
    """The classes of what FSDP shards; none where nobody has imported it."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
