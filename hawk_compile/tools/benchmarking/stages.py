"""The stages of an answer and, for each, the calls that are timed in turns."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from hawk_compile.capture.features import fresh
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.tools.benchmarking import scoring
from hawk_compile.tools.benchmarking.prompts import Prompt, encode, shortened
from hawk_compile.tools.benchmarking.subjects import Subjects, kept_of
from hawk_compile.tools.benchmarking.timing import Call

SCORINGS = 5
STEPS = 8
"""Work that one timed call repeats: scoring is short, and a decode step needs the one before it."""

Encoded = dict[str, Any]


def vision(subjects: Subjects, prompt: Prompt, given: Encoded, ratios: tuple[float, ...]) -> list[Call]:
    """The vision encoder, which no column prunes: pixels in, features and positions out."""
    return [
        Call("eager", None, lambda: functools.partial(encode, subjects.plain, prompt)),
        Call("compiled", None, lambda: functools.partial(subjects.compiled_vision, prompt)),
    ]


def scored(subjects: Subjects, prompt: Prompt, given: Encoded, ratios: tuple[float, ...]) -> list[Call]:
    """Norm, score, selection and gather of the embeddings alone: merged embeddings in, kept rows out.

    The authors' form is eager; this package's operators go through the backend, by themselves.
    """
    width = subjects.layer.input_layernorm.weight
    hidden = torch.randn(prompt.rows, prompt.length, width.shape[0], device=width.device).to(width.dtype)
    calls = []
    for ratio in ratios:
        chosen = scoring.selection(subjects.plain, prompt, kept_of(prompt, ratio))

        def authors(chosen: scoring.Selection = chosen) -> Any:
            return scoring.take(hidden, scoring.authors_keep(subjects.layer, chosen, hidden))

        def hawk(chosen: scoring.Selection = chosen) -> Any:
            return subjects.compiled_hawk(hidden, chosen)

        calls.append(Call("authors", ratio, repeated(authors, 1)))
        calls.append(Call("hawk", ratio, repeated(hawk, SCORINGS), SCORINGS))
    return calls


def repeated(function: Callable[[], Any], times: int) -> Callable[[], Callable[[], Any]]:
    def run() -> None:
        for _ in range(times):
            function()

    return lambda: run


def prefill(subjects: Subjects, prompt: Prompt, given: Encoded, ratios: tuple[float, ...]) -> list[Call]:
    """The decoder's prefill: encoded image and ids in, last logits and a filled cache out; planning included.

    "short" is what "compiled" takes for a prompt that holds only as many tokens as are kept, so what pruning would take
    if it were free.
    """
    calls = [
        Call("eager", None, lambda: lambda: subjects.plain(**fresh(given))),
        Call("compiled", None, lambda: lambda: subjects.compiled(given)),
    ]
    for ratio in ratios:
        short = shortened(prompt, given, kept_of(prompt, ratio))
        calls.append(Call("short", ratio, lambda short=short: lambda: subjects.compiled(short)))  # type: ignore[misc]
        calls.append(Call("authors", ratio, authors_call(subjects, prompt, given, ratio)))
        calls.append(Call("hawk", ratio, hawk_call(subjects, given, ratio)))
    return calls


def first(subjects: Subjects, prompt: Prompt, given: Encoded, ratios: tuple[float, ...]) -> list[Call]:
    """The first token as a whole: pixels and ids in, last logits out."""
    calls = [
        Call("eager", None, lambda: lambda: subjects.plain(**prompt.whole)),
        Call("compiled", None, lambda: lambda: subjects.compiled_whole(prompt)),
    ]
    for ratio in ratios:
        calls.append(Call("authors", ratio, authors_call(subjects, prompt, prompt.whole, ratio)))
        calls.append(Call("hawk", ratio, hawk_call(subjects, prompt.whole, ratio)))
    return calls


def authors_call(
    subjects: Subjects, prompt: Prompt, given: Encoded, ratio: float
) -> Callable[[], Callable[[], Any]]:
    return lambda: lambda: subjects.authors(prompt, given, kept_of(prompt, ratio))


def hawk_call(subjects: Subjects, given: Encoded, ratio: float) -> Callable[[], Callable[[], Any]]:
    def prepare() -> Callable[[], Any]:
        model = subjects.optimized(ratio)
        return lambda: model(**fresh(given))

    return prepare


def decode(subjects: Subjects, prompt: Prompt, given: Encoded, ratios: tuple[float, ...]) -> list[Call]:
    """One token behind the prompt: mean of STEPS steps that fill the cache, which is cut back before each call."""
    calls = [
        decode_call("eager", None, subjects.plain, subjects.plain(**fresh(given)), prompt, given),
        decode_call("compiled", None, subjects.compiled_step, subjects.compiled(given), prompt, given),
    ]
    for ratio in ratios:
        pruned = subjects.authors(prompt, given, kept_of(prompt, ratio))
        calls.append(decode_call("authors", ratio, subjects.plain, pruned, prompt, given))
        model = subjects.optimized(ratio)
        calls.append(decode_call("hawk", ratio, model, model(**fresh(given)), prompt, given))
    return calls


def decode_call(
    column: str, ratio: float | None, forward: Callable[..., Any], output: Any, prompt: Prompt, given: Encoded
) -> Call:
    cache = output.past_key_values
    held, positions = physical_length(cache), given.get("position_ids")
    if positions is None:
        following = torch.full_like(prompt.ids[:, :1], prompt.length)
    else:
        following = positions[-3:].amax(-1, keepdim=True) + 1
    step = {"input_ids": prompt.ids[:, -1:], "position_ids": following}

    def run() -> None:
        for place in range(STEPS):
            forward(**step | {"position_ids": following + place}, past_key_values=cache, use_cache=True)

    def prepare() -> Callable[[], Any]:
        if excess := physical_length(cache) - held:
            cache.crop(-excess)
        return run

    return Call(column, ratio, prepare, STEPS)


STAGES: dict[str, Callable[[Subjects, Prompt, Encoded, tuple[float, ...]], list[Call]]] = {
    "vision": vision,
    "scoring": scored,
    "prefill": prefill,
    "first": first,
    "decode": decode,
}
PRUNED = ("prefill", "first", "decode")
"""Stages that run the pruned model, whose logits are checked first."""
