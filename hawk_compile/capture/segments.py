"""Encoders over a packed row of patches (`grid_thw`), so that images of any sizes share a graph.

Such a tower gets its indices precomputed, as transformers' exporters do. The exporters' attention then needs images of
one size and gives wrong results for others. Here attention is handed the segments as an index [segments, longest], made
on the host. It is registered as an attention implementation; its name holds "flash", which makes models pass the
segments on instead of splitting them.

A tower undoes its window order by sorting the index that made it. The index is a permutation, so a scatter gives the
same, where a target cannot sort.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface

from hawk_compile.compat.exporters import precompute
from hawk_compile.compat.models import set_attention

ATTENTION = "hawk_flash_segments"
GRID = "grid_thw"
WINDOW_INDEX = "window_index"
PLACES = {"segments": "segment_places", "windows": "window_places"}
ARGUMENTS = {
    "segments": "cu_seqlens", "segment_places": "max_seqlen",
    "windows": "cu_window_seqlens", "window_places": "max_window_seqlen",
}  # fmt: skip
"""Under which arguments a tower hands these inputs on to its attention."""
WHOLE = "output"
"""How an encoder component's output is called that is one tensor; some modules call what they take their features."""
TOLERANCE = 0.02
"""Of the largest output, between attention by segments and by the tower's own: half precision over a tower's layers."""


def run(forward: Callable[..., Any], fixed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A module's forward on what `prepared` gives, beside arguments that are no tensors."""
    renamed = {ARGUMENTS.get(name, name): value for name, value in tensors.items()}
    return forward(**fixed, **renamed)


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


def attend_by_segments(copy: nn.Module) -> None:
    """Let a tower over packed patches attend by segments: a copy (`sharing_copy`), whose configs are its own."""
    AttentionInterface.register(ATTENTION, attention_over_segments)
    attend_by(copy, ATTENTION)


def attend_by(copy: nn.Module, name: str) -> None:
    """Let all modules of a copy, whose configs are its own, attend by an implementation of this name."""
    for part in copy.modules():
        config: Any = getattr(part, "config", None)
        if config is not None:
            set_attention(config, name)


def prepared(child: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of an encoder component for the tensors that its module would get: grids become indices."""
    return indexed(precomputed(child, tensors)) if GRID in tensors else tensors


def precomputed(child: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A module's inputs, with those beside them that it takes and that the exporters know how to make."""
    inputs: dict[str, Any] = dict(tensors)
    precompute()(child, inputs)
    return {name: value for name, value in inputs.items() if name in tensors or takes(child, name)}


def indexed(precomputed_inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs with an index of segments, and of windows, in the place of grids and bounds."""
    inputs = {name: value for name, value in precomputed_inputs.items() if name != GRID}
    for name, places in PLACES.items():
        bounds = inputs.pop(ARGUMENTS[name], None)
        inputs.pop(ARGUMENTS[places], None)  # the length of the longest, which the index holds
        if bounds is not None:
            inputs[name] = patches_of(bounds)
            inputs[places] = torch.nonzero(inputs[name].flatten() >= 0).squeeze(1)
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


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


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name."""
    signature = inspect.signature(module.forward)
    return name in signature.parameters or name_of_rest(signature) is not None


def name_of_rest(signature: inspect.Signature) -> str | None:
    """The name of the parameter that takes all other keyword arguments, if there is one."""
    return next((one.name for one in signature.parameters.values() if one.kind is one.VAR_KEYWORD), None)
