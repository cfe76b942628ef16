"""Three readings of "leave a head out", each a way to run a model with query heads of the scoring layer ablated.

    score       the head has no weight in the HAWK score, and the model runs pruned by it: what the weights are for
    attention   text does not see visual tokens through this head, and nothing is pruned: what it fetches from pictures
    output      the head's whole output is 0, and nothing is pruned: whatever it does, text to text included

The last two are made inside the model's own attention, each row of a batch with a head of its own: the scoring layer
alone is told to use a function of ours, under a name in transformers' table that no other module knows. Head weights
are one input [H] of the compiled graph for all rows, so "score" leaves out one head in a forward.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawk_compile.compat.models import set_attention
from hawk_compile.runtime.handover import first_with_keys

SCORE, ATTENTION, OUTPUT = "score", "attention", "output"
ABLATIONS = (SCORE, ATTENTION, OUTPUT)
FUNCTION = "sdpa"


@contextlib.contextmanager
def ablated(model: PreTrainedModel, kind: str, heads: Sequence[int], visual: Tensor) -> Iterator[None]:
    """Let the unpruned model run with one head ablated in each row.

    Args:
        kind: 'attention' or 'output'.
        heads: [B], each row's query head; none: all of them work.
        visual: [B, S] bool, the prompt's visual tokens; 'attention' hides them from text.
    """
    plain = ALL_ATTENTION_FUNCTIONS[FUNCTION]
    length = 0  # of the row so far: a cache may hold its end alone

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *a: Any, **k: Any
    ) -> Any:
        nonlocal length
        length += query.shape[2]
        if kind == ATTENTION:
            attention_mask = hidden(attention_mask, query, key, heads, visual, length)
        out, weights = plain(module, query, key, value, attention_mask, *a, **k)  # [B, S, H, d]
        if kind == OUTPUT:
            out = out.clone()
            out[list(range(len(heads))), :, list(heads)] = 0
        return out, weights

    with attending(model, attend) if heads else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def attending(model: PreTrainedModel, attend: Callable[..., Any]) -> Iterator[None]:
    """Let the scoring layer attend by a function of ours; neither other layers nor other models know of it."""
    name = f"hawk_ablated_{id(model)}"
    base: Any = model.base_model
    layer = first_with_keys(model)
    modules = [module for module in base.get_decoder().modules() if getattr(module, "layer_idx", None) == layer]
    configs = {module: module.config for module in modules if hasattr(module, "config")}
    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        for module, config in configs.items():
            module.config = copy.deepcopy(config)  # it is that of all layers, and masks are chosen by it
            set_attention(module.config, name)
        yield
    finally:
        for module, config in configs.items():
            module.config = config
        del ALL_ATTENTION_FUNCTIONS[name]


def hidden(
    mask: Tensor | None, query: Tensor, key: Tensor, heads: Sequence[int], visual: Tensor, length: int
) -> Tensor:
    """[B, H, Sq, Skv] bool: the mask, without visual keys for the text queries of each row's head."""
    rows, count, new = query.shape[:3]
    total = key.shape[2]
    allowed = seen(mask, new, total, query.device).expand(rows, count, new, total).clone()
    behind = max(0, length - visual.shape[1])  # what has been said since the prompt is text
    is_visual = torch.nn.functional.pad(visual, (0, behind))[:, length - total : length]
    text = ~is_visual[:, total - new :]  # the queries stand at the end
    allowed[list(range(rows)), list(heads)] &= ~(text.unsqueeze(2) & is_visual.unsqueeze(1))
    return allowed


def seen(mask: Tensor | None, new: int, total: int, device: torch.device) -> Tensor:
    """What a mask of transformers lets be seen, [.., Sq, Skv] bool; None is causal."""
    if mask is None:
        return torch.ones((new, total), dtype=torch.bool, device=device).tril(total - new)
    return mask[..., :total] if mask.dtype == torch.bool else mask[..., :total] == 0
