"""`save_compiled`: the graphs of the calls that a model has had, compiled ahead of time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from hawk_compile.capture.dynamo import capture_lock
from hawk_compile.capture.hooks import refuse_hooks
from hawk_compile.capture.inside import graph_modules
from hawk_compile.compat.dynamo import compile_package
from hawk_compile.compile.pipeline import source_tag
from hawk_compile.errors import CompileError, HawkError, InputError
from hawk_compile.exporting.folder import written_whole
from hawk_compile.exporting.quiet import quiet
from hawk_compile.files import digest_of, path_of
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.runtime.handover import scratch_cache, scratch_layers
from hawk_compile.runtime.kinds import Kind
from hawk_compile.runtime.originals import original
from hawk_compile.runtime.state import Runtime
from hawk_compile.saved.calls import NotSaved, described
from hawk_compile.saved.graph import Graph, filled, graph_of
from hawk_compile.saved.key import key_of, modules_key
from hawk_compile.saved.manifest import Manifest, Part
from hawk_compile.saved.model import optimised
from hawk_compile.saved.sizes import serves

SETTINGS = {"cpp.dynamic_threads": True}
"""Of the compiler: code that asks how many threads there are, which may be others where it is loaded."""


def save_compiled(
    model: Any, folder: str | os.PathLike[str], *, overwrite: bool = False, progress: Listener = nobody
) -> list[str]:
    """Write the compiled prefill of an optimised model to a folder, so that a new process need not compile it.

        model = hawk_compile.optimize(model, ratio=0.8)
        hawk_compile.warm_up(model, inputs)                       # or whatever has prompts of each kind that will come
        hawk_compile.save_compiled(model, "compiled/")

    in a new process, with the same checkpoint and settings:

        model = hawk_compile.optimize(model, ratio=0.8)
        hawk_compile.load_compiled(model, "compiled/")
        model.generate(**inputs)                                  # no tracing, no passes, no compilation

    What is saved are graphs for the kinds of calls that the model has had by its present settings: one row or a batch,
    padded or not, all logits or the last, images or video. Each serves every ratio, and the sizes that a compiled one
    would serve. No weight is in the folder. It is compiled code: keep it from others' hands, as a compiler's cache.

    Args:
        model: an optimised model on a CPU that has had a prompt, or what holds one.
        folder: it must not exist, unless `overwrite`.
        overwrite: replace the folder if it is one of these.
        progress: told of "capturing", "passes" and "compiling" of each graph.

    Returns:
        For each kind of call that was left out, why. Such calls are compiled as ever, in each process.

    Raises:
        InputError: a model that is not optimised, or has had no prompt that could be saved; a folder in the way.
        CompileError: the graph cannot be compiled ahead of time.
    """
    place = path_of(folder, "folder")
    inner, runtime = optimised(model, "save_compiled")
    kinds = [*runtime.prefill.kinds]
    if not kinds:
        raise InputError(
            "model must have had a prompt with visual tokens by its present settings, whose graphs are saved, and has "
            "had none: call hawk_compile.warm_up first, or generate, with prompts of the kinds that there will be"
        )
    layers = runtime.scratch_layers if runtime.scratch_layers is not None else scratch_layers(inner)
    writer = Writer(inner, runtime, lambda: scratch_cache(None, layers))
    left_out: list[str] = []
    with torch.no_grad(), capture_lock, written_whole(place, overwrite) as made:
        key, modules = key_of(inner, runtime.prefill), modules_key(inner)
        for number, kind in enumerate(kinds):
            told = Told(progress, number, len(kinds))
            try:
                writer.write(kind, made, told)
            except NotSaved as reason:
                left_out.append(str(reason))
                told(f"left out: {reason}")
        parts = writer.parts
        if not parts:
            raise InputError(
                f"model has had no call that could be saved ({'; '.join(dict.fromkeys(left_out))}): let it compile in "
                "each process, where the compiler's cache on disk helps"
            )
        Manifest(key, modules, parts).write(made)
    progress(Progress(len(kinds), len(kinds), "saved"))
    return left_out


class Told:
    """Tells a listener of the stages of one graph."""

    def __init__(self, progress: Listener, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def __call__(self, text: str) -> None:
        self.progress(Progress(self.done, self.total, text))


class Writer:
    """Writes graphs of a model, one for each kind of call that none before it serves.

    Args:
        empty_cache: makes the cache that a call is given.
    """

    def __init__(self, model: Any, runtime: Runtime, empty_cache: Callable[[], Any]) -> None:
        self.model, self.runtime, self.empty_cache = model, runtime, empty_cache
        self.graphs: list[Graph] = []
        self.parts: dict[str, Part] = {}

    def write(self, kind: Kind | str, folder: Path, told: Told) -> None:
        """Write the graph of a kind.

        Raises:
            NotSaved: no folder can serve it.
            UnsupportedCallError: hooks of users stand on modules in the graph.
        """
        if isinstance(kind, str):
            raise NotSaved(kind)
        if self.serves(kind):
            return
        refuse_hooks(graph_modules(self.model), "a saved prefill")
        name = f"prefill_{len(self.parts)}"
        graph = graph_of(
            self.model, self.runtime, original(self.model, "forward"), self.runtime.prefill.options, kind,
            self.empty_cache, compiler(folder / f"{name}.pt2", type(self.model).__name__), told,
        )  # fmt: skip
        self.graphs.append(graph)
        self.parts[name] = part_of(graph, folder, f"{name}.pt2")

    def serves(self, kind: Kind) -> bool:
        """Whether a graph is there already: another state of the model may have had the same call."""
        inputs, planned, along = filled(kind, self.empty_cache())
        tensors: list[Tensor] = []
        call = described([inputs, None, planned, along], tensors)
        return any(graph.call == call and serves(graph, tensors) for graph in self.graphs)


def compiler(path: Path, model: str) -> Callable[[fx.GraphModule, list[Tensor]], None]:
    """What writes a graph as a package.

    Raises:
        CompileError: as `save_compiled`.
    """

    def write(gm: fx.GraphModule, fakes: list[Tensor]) -> None:
        try:
            with quiet(), torch.compiler.config.patch(cache_key_tag=source_tag()):  # type: ignore[attr-defined]
                compile_package(gm, fakes, str(path), SETTINGS)
        except Exception as error:
            raise CompileError(
                f"AOTInductor cannot compile the prefill of {model} ({type(error).__name__}: {str(error)[:300]}): "
                "leave save_compiled out; each process then compiles by itself"
            ) from error

    return write


def part_of(graph: Graph, folder: Path, file: str) -> Part:
    return Part(
        file=file,
        sha256={file: digest_of(folder / file, HawkError, "a graph was written")},
        inputs=graph.sources,
        call=graph.call,
        shapes=graph.shapes,
        symbols={name: [*place] for name, place in graph.symbols.items()},
        ranges={name: [*bounds] for name, bounds in graph.ranges.items()},
        conditions=graph.conditions,
        recipe=graph.recipe,
        layer=graph.layer,
    )
