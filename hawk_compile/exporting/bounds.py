"""Towers that get the sizes of images and the bounds of segments as they are, beside the index that they attend by.

Some look at these elsewhere than in their attention, or hand on bounds alone. So an index does not stand in their
place, as it does in `hawk_compile.capture.segments`: attention finds it by the bounds that it is handed. Towers that
count bounds of their own, from other inputs than a grid, attend within them by a mask.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from hawk_compile.capture import segments
from hawk_compile.capture.segments import ARGUMENTS, GRID, PLACES
from hawk_compile.errors import UnsupportedModelError

ATTENTION = "hawk_flash_bounds"
GRIDS = "grids"
"""How the sizes of images [images, 3] are called as an input. By the tower's own name the exporters would add to it."""
ENDS = {"segments": "segment_ends", "windows": "window_ends"}
"""And the patch behind the last of each segment: [segments] or [windows]."""

indices: ContextVar[dict[int, tuple[Tensor, Tensor]]] = ContextVar("indices")
"""By the id of a tensor with bounds: segments and places, while a module runs that is given both."""


def prepared(child: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of an encoder component for the tensors that its module would get: indices, and what they are made of.

    Of a module without a grid: its tensors, and the ends of segments where the exporters know how it counts them.
    """
    if GRID not in tensors and not has_bounds(child):
        return tensors
    inputs = segments.precomputed(child, tensors)
    ends = {ENDS[name]: inputs[ARGUMENTS[name]][1:] for name in PLACES if ARGUMENTS[name] in inputs}
    return {**(segments.indexed(inputs) | {GRIDS: inputs[GRID]} if GRID in tensors else tensors), **ends}


def has_bounds(module: nn.Module) -> bool:
    """Whether there is attention within bounds in a module."""
    return any(ARGUMENTS["segments"] in signature(part.forward).parameters for part in module.modules())


def are_prepared(names: Iterable[str]) -> bool:
    """Whether inputs of these names are with sizes and ends, or one of them."""
    return not {GRIDS, *ENDS.values()}.isdisjoint(names)


def run(forward: Callable[..., Any], fixed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A module's forward on what `prepared` gives, beside arguments that are no tensors."""
    given = dict(tensors)
    arguments: dict[str, Any] = {GRID: given.pop(GRIDS)} if GRIDS in given else {}
    known = {}
    for name, places in PLACES.items():
        if ENDS[name] in given:
            bounds = arguments[ARGUMENTS[name]] = pad(given.pop(ENDS[name]), (1, 0))
        if name in given:
            # Places stand where the longest length would, which is read from the bounds if it is not there.
            places_of = arguments[ARGUMENTS[places]] = given.pop(places)
            known[id(bounds)] = (given.pop(name), places_of)
    token = indices.set(known)
    try:
        return forward(**fixed, **arguments, **given)
    finally:
        indices.reset(token)


def attention_within_bounds(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, H, N, d] within bounds `cu_seq_lens_q` [segments + 1].

    Where there is an index of these very bounds, by `attention_over_segments`; else by a mask [N, N] made of them.
    """
    if (index := indices.get({}).get(id(cu_seq_lens_q))) is not None:
        return segments.attention_over_segments(module, query, key, value, None, scaling, 0.0, *index)
    if cu_seq_lens_q is None:
        raise UnsupportedModelError("some of its attention is not within bounds")
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (values.repeat_interleave(group, 1) for values in (key, value))
    patches = torch.arange(query.shape[2], device=query.device)
    segment = (patches[:, None] >= cu_seq_lens_q[1:]).sum(1)
    mask = segment[:, None] == segment
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None], scale=scaling)
    return mixed.transpose(1, 2), None


def attend_within_bounds(copy: nn.Module) -> None:
    """Let a tower attend within the bounds that it hands on: a copy (`sharing_copy`), whose configs are its own."""
    AttentionInterface.register(ATTENTION, attention_within_bounds)
    segments.attend_by(copy, ATTENTION)
