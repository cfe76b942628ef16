"""The torch.compile backend: `torch.compile(model, backend="hawk", options={"ratio": 0.8}, dynamic=True)`.

A graph that merges visual features into token embeddings is rewritten by the passes and handed to the inner compiler
(`options["backend"]`); every other graph goes to the inner compiler as it is.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import SymInt, fx
from transformers import GenerationMixin

from hawk_compile.compat.dynamo import backend_of, handed_on, let_compiled_modules_answer, lookup_backend
from hawk_compile.compat.models import let_generate_ask
from hawk_compile.compile.pipeline import PASSES, PassOptions, Step, run_passes, source_tag
from hawk_compile.compile.pruned_keys import left_in_a_cache, that_ends_here
from hawk_compile.errors import ConfigError, HawkError, MergeNotFoundError, UnsupportedCallError
from hawk_compile.passes.graph import is_call
from hawk_compile.passes.locate_prefill import find_merges
from hawk_compile.passes.site import Located, find
from hawk_compile.settings.config import HawkConfig, make_config

log = logging.getLogger("hawk_compile")

BEYOND_A_GRAPH = {
    ("modalities",): "the ids of placeholders",
    ("question", "processor", "vision_end_token_id", "end_of_turn_token_id"): "the prompt's ids",
    ("budget", "min_per_image", "quota", "bucket", "normalize_per"): "the prompt",
    ("compile_decode", "compile_vision", "image_cache"): "the model's other graphs",
}
"""Settings that only `optimize` can follow, and what they need."""


def hawk(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, **others: Any
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's, pruning visual tokens where it merges them.

    Args:
        options: settings of `HawkConfig` by name; `ratio` is the fraction of visual tokens removed. Head weights are
            taken as given ("auto" means equal weights here: a graph does not know its checkpoint).
        others: what else torch.compile was given for a backend, as `mode`: none is taken.

    Raises:
        ConfigError: a setting that does not exist, is out of range, or stands beside `options`.
        GraphError: the graph merges visual features but cannot be pruned.
    """
    try:
        refuse_generate()
        if others:
            given = ", ".join(f"{name}={value!r}" for name, value in others.items())
            raise ConfigError(
                f'torch.compile(backend="hawk") takes its settings in options alone, got {given}: leave it out (in a '
                'CompileConfig, mode=None), and name the compiler in options["backend"]'
            )
        return compile_pruned(gm, example_inputs, dict(options or {}))
    except HawkError as error:
        raise handed_on(error) from error.__cause__


def refuse_generate() -> None:
    """Refuse graphs of what generate calls, as behind `model.compile(backend="hawk")`: its masks and positions would be
    those of the whole prompt behind a cache of a pruned one.

    Raises:
        UnsupportedCallError: generate is among the calls that led here.
    """
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is generate:
            raise UnsupportedCallError(
                'generate was called of a model that backend="hawk" compiles (model.compile, or torch.compile of a '
                "part), whose masks and positions would not be those of a pruned prompt: call "
                "hawk_compile.optimize(model, ratio=...), with what stands in options, on the model as it was, and "
                "generate of that"
            )
        frame = frame.f_back


def compile_pruned(gm: fx.GraphModule, example_inputs: list[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """The same; what it raises, Dynamo puts into an error of its own."""
    from hawk_compile.settings.head_weights import explicit_weights

    config = make_config(None, settings)
    for names, needed in BEYOND_A_GRAPH.items():
        if unusable := [name for name in names if name in settings]:
            raise ConfigError(
                f'options["{unusable[0]}"] needs {needed}, which a graph does not know: leave it out, or use '
                "hawk_compile.optimize"
            )
    weights = explicit_weights(config.head_weights)
    settled = replace(options_of(config, head_weights=weights, removed=config.removed), query=config.used_query)
    places = left_in_a_cache(gm.graph) if holds_prefill(gm) and config.removed else []
    compiled = compile_graph(gm, example_inputs, config, settled)
    if config.removed:
        warn_of_fixed_length(gm)
    return that_ends_here(compiled, places) if places else compiled


def warn_of_fixed_length(gm: fx.GraphModule) -> None:
    """Say where a prefill was captured for a length that is a number: what code does by it, no graph shows."""
    located = find(gm, Located)
    if located is not None and not isinstance(located.length, SymInt):
        warnings.warn(
            "a pruned prompt was captured for its own length alone (torch.compile without dynamic=True), where a "
            "branch of the model's code on the length of its prompt cannot be seen, which may differ at the pruned "
            "length: give torch.compile dynamic=True, by which such branches are refused and one graph serves every "
            "length",
            stacklevel=2,
        )


def generate_of_compiled(compiled: Any) -> Callable[..., Any]:
    """generate of what `torch.compile(model, backend="hawk")` returned, which torch hands on to the model inside:
    nothing of it would be compiled, and nothing pruned.

    Raises:
        AttributeError: another backend compiles the module.
    """
    if backend_of(compiled) is not hawk:
        raise AttributeError("generate")

    def generate(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedCallError(
            'generate of what torch.compile(model, backend="hawk") returned would run the model inside it, neither '
            "compiled nor pruned: call hawk_compile.optimize(model, ratio=...), with what stands in options, and "
            "generate of that"
        )

    return generate


def refuse_compile_config(settings: Any) -> None:
    """Refuse `CompileConfig(backend="hawk")`, by which generate compiles its decode steps alone, and not even these on
    a CPU or with a cache that grows.

    Args:
        settings: of a call of generate, a GenerationConfig.

    Raises:
        UnsupportedCallError: they hold such a CompileConfig.
    """
    if getattr(getattr(settings, "compile_config", None), "backend", None) in ("hawk", hawk):
        raise UnsupportedCallError(
            'compile_config=CompileConfig(backend="hawk") was given to generate, which compiles by it no more than '
            "single steps behind the prompt, so that nothing would be pruned: call hawk_compile.optimize(model, "
            "ratio=...), with what stands in options, and generate without it"
        )


let_compiled_modules_answer("generate", generate_of_compiled)
let_generate_ask(refuse_compile_config)


def options_of(config: HawkConfig, **more: Any) -> PassOptions:
    """What the passes are told of the settings beside a plan, which leaves "last" one voter."""
    method = config.method
    return PassOptions(
        normalization=config.used_normalization,
        query="mean" if config.used_query == "last" else config.used_query,
        mass=None if config.budget is None else config.budget.mass,
        ranking=method.ranking,
        ranking_options=tuple(method.options.items()),
        **more,
    )


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], config: HawkConfig, options: PassOptions,
    passes: Sequence[Step] = PASSES,
) -> Callable[..., Any]:  # fmt: skip
    """Rewrite the graph if it holds a prefill, and compile it with the config's inner compiler."""
    if holds_prefill(gm):
        gm = run_passes(gm, example_inputs, options, passes)
    else:
        log.info("a graph of %d nodes merges no visual features and is compiled as it is", len(gm.graph.nodes))
    with torch.compiler.config.patch(cache_key_tag=source_tag()):  # type: ignore[attr-defined]
        return inner_compiler(config.backend)(gm, example_inputs)


def holds_prefill(gm: fx.GraphModule) -> bool:
    """Whether a graph merges visual features, or has a plan, so that it must: the passes then say what is missing."""
    try:
        find_merges(gm.graph)
    except MergeNotFoundError:
        return any(is_call(node, "plan") for node in gm.graph.nodes)
    return True


def inner_compiler(name: str) -> Callable[..., Any]:
    """The compiler of a backend's name."""
    compiler = lookup_backend(name)

    def compile_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        compiled = compiler(gm, example_inputs)
        # A graph module writes its code when it is first run or asked for it; two threads that run it first, at the
        # same time, would write it twice at once, and one run broken code.
        _ = gm.code
        return compiled

    return compile_graph
