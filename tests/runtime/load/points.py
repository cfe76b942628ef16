"""Points at which a call can be told to fail: encoder, layers, what is compiled, and the compiling of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hawk_compile.compile import backend
from hawk_compile.runtime import compiled


class Fuse(threading.local):
    """Where the calls of this thread fail next: at a point, after passing it `left` times."""

    point: str | None = None
    left = 0
    error: type[BaseException] = RuntimeError


fuse = Fuse()
inside_of_graphs: list[Callable[[], None]] = []
"""What is to be checked where a graph begins to run."""


def check(point: str) -> None:
    if fuse.point != point:
        return
    fuse.left -= 1
    if fuse.left < 0:
        fuse.point = None
        raise fuse.error(told_at(point))


def told_at(point: str) -> str:
    """What is thrown there says."""
    return f"in {point}"


@torch.library.custom_op("hawk_load::passing", mutates_args=())
def passing(value: Tensor) -> Tensor:
    """The same, unless the graph is to fail here."""
    check("graph")
    return value.clone()


@passing.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def with_points(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph of a prefill, which may fail at its end, in its middle, or where it begins to compute."""
    floats = [
        node for node in gm.graph.nodes
        if node.op == "call_function" and isinstance(value := node.meta.get("example_value"), Tensor)
        and value.is_floating_point() and value.ndim == 3
    ]  # fmt: skip
    for node in {floats[0], floats[len(floats) // 2], floats[-1]}:
        with gm.graph.inserting_after(node):
            after = gm.graph.call_function(torch.ops.hawk_load.passing.default, (node,))
        after.meta.update(node.meta)
        node.replace_all_uses_with(after, delete_user_cb=lambda user, after=after: user is not after)
    gm.recompile()
    return gm


@contextlib.contextmanager
def fallible() -> Iterator[None]:
    """Let what is compiled inside fail where it is told to: as it is compiled, where it begins, within, behind it."""

    def around(compiler: Callable[..., Any], prefix: str, change: Callable[..., Any] = lambda gm: gm) -> Any:
        def made(name: str) -> Callable[..., Any]:
            inner = compiler(name)

            def compile_graph(gm: Any, example_inputs: Any) -> Callable[..., Any]:
                check(f"compiling {prefix}")
                graph = inner(change(gm), example_inputs)

                def run(*args: Any) -> Any:
                    for each in inside_of_graphs:
                        each()
                    check(f"before {prefix}")
                    result = graph(*args)
                    check(f"behind {prefix}")
                    return result

                return run

            return compile_graph

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "inner_compiler", around(backend.inner_compiler, "prefill", with_points))
        patch.setattr(compiled, "inner_compiler", around(compiled.inner_compiler, "decode step"))
        yield


def fragile(model: Any) -> Any:
    """A model whose encoder and layers may fail where they run outside of a graph; to be made before `optimize`."""
    base = model.base_model
    tower = getattr(base, "visual", None) or base.vision_tower
    may_fail(tower, "encoder")
    for layer in base.get_decoder().layers:
        may_fail(layer.mlp, "layer")
    return model


def may_fail(module: nn.Module, point: str) -> None:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            check(point)
        return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
