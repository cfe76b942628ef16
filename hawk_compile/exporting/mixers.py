"""Token mixers in a graph that other runtimes have: a scan over chunks of tokens, or over tokens.

In the captured graph such a mixer is one operator without a length (`hawk_compile.capture.mixers`), so that the passes
can put the cut in front of it or behind it. Here it becomes a loop again, over as many chunks as there are, of which
each is the model's own function on CHUNK tokens; or over tokens, by the function that the model has for one.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hawk_compile.capture.mixers import LENGTH, STATE, calls, originals, results_of, sized
from hawk_compile.compat.dynamo import scan

CHUNK = 16
"""Tokens that are mixed at once. What a model's function does to each of a chunk is in the graph as often."""
SIZE = "chunk_size"


def inline_mixers(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Mix by a scan. The graph has to be traced again before anything looks at its operators."""
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.hawk.mix_chunks.default):
        node.target = mixed_by_scan
    graph_module.recompile()
    return graph_module


def mixed_by_scan(tensors: list[Tensor], call: str) -> list[Tensor]:
    """What `hawk::mix_chunks` gives: mixed tokens and the state behind the last one, [B, H, ...]."""
    return mixed_by_token(tensors, call) if calls[call].kind.step else mixed_by_chunk(tensors, call)


def mixed_by_token(tensors: list[Tensor], call: str) -> list[Tensor]:
    """Mixed tokens [B, D, S] and the state, from an empty one."""
    asked, (rows, _, length) = calls[call], tensors[0].shape
    given = asked.arguments(tensors)
    along = {
        name: given[name].movedim(asked.kind.tokens, 0).contiguous()
        for name, shape in zip(asked.tensors, asked.shapes(tensors), strict=True) if LENGTH in shape
    }  # fmt: skip
    file, _, _ = asked.mixer.rpartition(".")
    one: Callable[..., Tensor] = inspect.unwrap(getattr(sys.modules[file], asked.kind.step))
    taken = [*inspect.signature(one).parameters][1:]
    (_, mixed_dtype), (state_shape, state_dtype) = results_of(call, tensors)

    def step(before: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
        after, values = before.clone(), given | dict(zip(along, token, strict=True))
        named = {name: values.get(asked.kind.renamed.get(name, name)) for name in taken}
        mixed = one(after, **{name: value for name, value in named.items() if value is not None})
        return after, mixed.to(mixed_dtype).clone()

    state = tensors[0].new_zeros(sized(state_shape, rows, length), dtype=state_dtype)
    state, mixed = scan(step, state, [*along.values()])
    return [mixed.movedim(0, -1), state]


def mixed_by_chunk(tensors: list[Tensor], call: str) -> list[Tensor]:
    """Mixed tokens [B, S, H, d] and the state.

    Chunks are whole: rows of zeros stand in front, which leave the empty state that they meet as it is.
    """
    asked, (rows, length) = calls[call], tensors[0].shape[:2]
    function = inspect.unwrap(originals[asked.mixer])
    parameters = inspect.signature(function).parameters
    state_name = next(name for name in parameters if name.startswith(STATE))
    size = {SIZE: CHUNK} if SIZE in parameters else {}
    given = dict(zip(asked.tensors, tensors, strict=True))
    shapes = zip(asked.tensors, asked.shapes(tensors), strict=True)
    along = {name: given[name] for name, shape in shapes if LENGTH in shape}
    (mixed_shape, mixed_dtype), (state_shape, state_dtype) = results_of(call, tensors)
    count = (length + 2 * CHUNK - 1) // CHUNK  # one more than there need be, since a graph for one is for no other
    missing = count * CHUNK - length
    chunks = {name: in_chunks(values, count, missing) for name, values in along.items()}
    state = given.get(state_name)
    if state is None:
        state = tensors[0].new_zeros(sized(state_shape, rows, length), dtype=state_dtype)

    def step(before: Tensor, chunk: list[Tensor]) -> tuple[Tensor, Tensor]:
        arguments = asked.arguments(tensors) | size | dict(zip(chunks, chunk, strict=True)) | {state_name: before}
        mixed, after = function(**arguments)
        return after.to(before.dtype).clone(), mixed.to(mixed_dtype).clone()

    state, mixed = scan(step, state.to(state_dtype).clone(), [*chunks.values()])
    mixed = mixed.transpose(0, 1).reshape(rows, count * CHUNK, *mixed_shape[2:])
    return [mixed.index_select(1, torch.arange(length, device=mixed.device) + missing), state]


def in_chunks(values: Tensor, count: Any, missing: Any) -> Tensor:
    """[count, B, CHUNK, ...] of values [B, S, ...], behind `missing` rows of zeros."""
    places = torch.arange(count * CHUNK, device=values.device) - missing
    real = (places >= 0).view(1, -1, *[1] * (values.ndim - 2))
    whole = values.index_select(1, places.clamp_min(0)) * real.to(values.dtype)
    return whole.reshape(values.shape[0], count, CHUNK, *values.shape[2:]).transpose(0, 1).contiguous()
