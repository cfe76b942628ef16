"""Encoders over a packed row of patches (`grid_thw`), so that images of any sizes share a graph.

Such a tower gets its indices precomputed, as transformers' exporters do. The exporters' attention then needs images of
one size and gives wrong results for others. Here attention is handed the segments as an index [segments, longest], made
on the host. It is registered as an attention implementation; its name holds "flash", which makes models pass the
segments on instead of splitting them.

Some towers look at the bounds of segments or the sizes of images elsewhere too. An export gives them those as they are,
and their attention finds the index of the bounds that it is handed, see `run_plainly`.

A tower undoes its window order by sorting the index that made it. The index is a permutation, so a scatter gives the
same, where a target cannot sort.
"""

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface

from hawk_compile.compat.exporters import precompute
from hawk_compile.compat.models import set_attention

ATTENTION, PLAIN_ATTENTION = "hawk_flash_segments", "hawk_flash_bounds"
GRID = "grid_thw"
WINDOW_INDEX = "window_index"
PLACES = {"segments": "segment_places", "windows": "window_places"}
ARGUMENTS = {
    "segments": "cu_seqlens", "segment_places": "max_seqlen",
    "windows": "cu_window_seqlens", "window_places": "max_window_seqlen",
}  # fmt: skip
"""Under which arguments a tower hands these inputs on to its attention."""
GRIDS = "grids"
"""How the sizes of images [images, 3] are called as an input beside an index."""
ENDS = {"segments": "segment_ends", "windows": "window_ends"}
"""And the patch behind the last of each segment: [segments] or [windows]."""
WHOLE = "output"
"""How an encoder component's output is called that is one tensor; some modules call what they take their features."""
TOLERANCE = 0.02
"""Of the largest output, between attention by segments and by the tower's own: half precision over a tower's layers."""


def run(forward: Callable[..., Any], fixed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A module's forward on what `prepared` gives, beside arguments that are no tensors."""
    renamed = {ARGUMENTS.get(name, name): value for name, value in tensors.items()}
    return forward(**fixed, **renamed)


indices: ContextVar[dict[int, tuple[Tensor, Tensor]]] = ContextVar("indices")
"""By the id of a tensor with bounds: segments and places, while a module runs that is given both."""


def run_plainly(forward: Callable[..., Any], fixed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A module's forward on what `prepared(plain=True)` gives: it gets sizes and bounds as without an index."""
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


class SortedByScatter(TorchFunctionMode):
    """Lets `torch.argsort` of this very tensor [n] int64, a permutation of 0 ... n-1, be its inverse by a scatter.

    In this thread alone. It is for targets whose sort is limited in length.
    """

    def __init__(self, permutation: Tensor | None):
        super().__init__()
        self.permutation = permutation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.argsort or kwargs or len(args) > 1 or args[0] is not self.permutation:
            return func(*args, **(kwargs or {}))
        (permutation,) = args
        places = torch.arange(permutation.shape[0], device=permutation.device)
        return torch.zeros_like(permutation).scatter(0, permutation, places)


def attention_over_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, H, N, d] within segments; of keys and values there may be fewer heads.

    `cu_seq_lens_q` holds the patches of each segment [segments, longest], -1 behind its last; `max_length_q` holds the
    place of each patch in that layout [N].
    """
    segments, longest = cu_seq_lens_q.shape
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (values.repeat_interleave(group, 1) for values in (key, value))
    if isinstance(segments, int) and segments == 1:  # in a graph of its own; without a mask attention is faster
        return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    real = cu_seq_lens_q >= 0
    places = cu_seq_lens_q.clamp_min(0).flatten()

    def batched(values: Tensor) -> Tensor:
        heads, width = values.shape[1], values.shape[3]
        return values[0].index_select(1, places).reshape(heads, segments, longest, width).transpose(0, 1)

    mixed = scaled_dot_product_attention(
        batched(query), batched(key), batched(value), attn_mask=real[:, None, None, :], scale=scaling
    )
    heads, patches, width = query.shape[1:]
    rows = mixed.transpose(1, 2).reshape(segments * longest, heads * width)
    return rows.index_select(0, max_length_q).reshape(1, patches, heads, width), None


def attention_within_bounds(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, H, N, d] within bounds `cu_seq_lens_q` [segments + 1].

    Where there is an index of these very bounds, by `attention_over_segments`; else by a mask [N, N] made of them.
    """
    if (index := indices.get({}).get(id(cu_seq_lens_q))) is not None:
        return attention_over_segments(module, query, key, value, None, scaling, 0.0, *index)
    if cu_seq_lens_q is None:
        raise ValueError("some of its attention is not within bounds")
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = (values.repeat_interleave(group, 1) for values in (key, value))
    patches = torch.arange(query.shape[2], device=query.device)
    segment = (patches[:, None] >= cu_seq_lens_q[1:]).sum(1)
    mask = segment[:, None] == segment
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None], scale=scaling)
    return mixed.transpose(1, 2), None


def attend_by_segments(copy: nn.Module, plain: bool = False) -> None:
    """Let a tower over packed patches attend by segments: a copy (`sharing_copy`), whose configs are its own.

    Args:
        plain: by the index of the bounds that it hands on, instead of by what it hands on in their place.
    """
    name = PLAIN_ATTENTION if plain else ATTENTION
    AttentionInterface.register(name, attention_within_bounds if plain else attention_over_segments)
    for part in copy.modules():
        config: Any = getattr(part, "config", None)
        if config is not None:
            set_attention(config, name)


def prepared(child: nn.Module, tensors: dict[str, Tensor], plain: bool = False) -> dict[str, Tensor]:
    """The inputs of an encoder component for the tensors that its module would get: grids become indices.

    Args:
        plain: what the indices are made from stays beside them; and bounds of segments that a module without a grid
            would count from other inputs are there too.
    """
    if GRID not in tensors:
        return {**tensors, **counted_ends(child, tensors)} if plain else tensors
    inputs = dict(tensors)
    precompute()(child, inputs)
    inputs = {name: value for name, value in inputs.items() if name in tensors or takes(child, name)}
    grids = inputs.pop(GRID)
    if plain:
        inputs[GRIDS] = grids
    for name, places in PLACES.items():
        bounds = inputs.pop(ARGUMENTS[name], None)
        inputs.pop(ARGUMENTS[places], None)  # the length of the longest, which the index holds
        if bounds is not None:
            if plain:
                inputs[ENDS[name]] = bounds[1:]
            inputs[name] = patches_of(bounds)
            inputs[places] = torch.nonzero(inputs[name].flatten() >= 0).squeeze(1)
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def counted_ends(child: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ends of segments by name, where the exporters know how a module counts them."""
    inputs: dict[str, Any] = dict(tensors)
    if has_bounds(child):
        precompute()(child, inputs)
    bounds = inputs.get(ARGUMENTS["segments"])
    return {} if bounds is None else {ENDS["segments"]: bounds[1:]}


def patches_of(bounds: Tensor) -> Tensor:
    """[segments, longest] int64 from cumulative lengths [segments + 1]; -1 behind a segment's last patch."""
    starts, lengths = bounds[:-1].long(), (bounds[1:] - bounds[:-1]).long()
    step = torch.arange(int(lengths.max()), device=bounds.device)
    return torch.where(step < lengths[:, None], starts[:, None] + step, -1)


def named(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name: `output` of a tensor, `name` of a field, `name.i.n` of a field of n.

    A tuple of n is one field, called `output`.
    """
    if isinstance(output, Tensor):
        return {WHOLE: output}
    tensors: dict[str, Tensor] = {}
    for name, value in {WHOLE: output}.items() if isinstance(output, tuple) else output.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (tuple, list)):
            parts = [(f"{name}.{index}.{len(value)}", part) for index, part in enumerate(value)]
            tensors |= {label: part for label, part in parts if isinstance(part, Tensor)}
    return tensors


def difference(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How outputs by segments, or the first part of them, differ from those by the grid; empty if they do not.

    They are compared by name, to `TOLERANCE` of the largest value.
    """
    furthest = max(float((first(outputs[name], rows.shape) - rows).abs().max()) for name, rows in expected.items())
    if furthest <= TOLERANCE * max(float(rows.abs().max()) for rows in expected.values()):
        return ""
    return f"its outputs differ by {furthest:.2g}"


def first(values: Tensor, shape: torch.Size) -> Tensor:
    """The part of values that begins them in every dimension: rows may lie along any."""
    return values[tuple(slice(size) for size in shape)]


def flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those under ** among them."""
    rest = name_of_rest(bound.signature)
    named_arguments = dict(bound.arguments)
    more = named_arguments.pop(rest, {}) if rest else {}
    return {**named_arguments, **more}


def has_bounds(module: nn.Module) -> bool:
    """Whether there is attention within bounds in a module."""
    bounds = ARGUMENTS["segments"]
    return any(bounds in inspect.signature(part.forward).parameters for part in module.modules())


def is_plain(names: Iterable[str]) -> bool:
    """Whether these are inputs as `prepared(plain=True)` gives them."""
    return not {GRIDS, *ENDS.values()}.isdisjoint(names)


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name."""
    signature = inspect.signature(module.forward)
    return name in signature.parameters or name_of_rest(signature) is not None


def name_of_rest(signature: inspect.Signature) -> str | None:
    """The name of the parameter that takes all other keyword arguments, if there is one."""
    return next((one.name for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
