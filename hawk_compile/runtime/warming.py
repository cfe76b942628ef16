"""`warm_up`: what the first prompts of a server would wait for is compiled ahead, by answering prompts of their kinds.

A graph serves prompts of every size. Another one is compiled for more than one row, and for padding.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hawk_compile.capture.modalities import PER_TOKEN_INPUTS, along_prompt, modalities_of
from hawk_compile.errors import HawkError, InputError
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.runtime.positions import deltas_kept
from hawk_compile.runtime.state import RUNTIME, Runtime, holder
from hawk_compile.runtime.wrappers import is_wrapper, optimised_model

TOKENS = 3
"""Of an answer: one comes of the prefill, and a step whose cache has grown shows a compiler that it grows."""

Prompt = Mapping[str, Any]


def warm_up(model: nn.Module, *prompts: Prompt, batches: bool = True, progress: Listener = nobody) -> int:
    """Compile ahead what prompts of these kinds wait for, by answering each with a few tokens.

    The model is left as it was: its report is that of its last prompt before.

    Args:
        model: optimised, or what holds one.
        *prompts: arguments of `generate`, as a processor makes them: one for each kind that will come (an image, a
            video, both). Their sizes and texts do not matter.
        batches: also as two rows, and as two rows with padding, unless they have several rows already.
        progress: told of every answer.

    Returns:
        How many graphs of the prefill were compiled; 0 if all were there.

    Raises:
        HawkError: a model that is not optimised.
        InputError: no prompt, or one without ids or without anything to prune.
        UnsupportedCallError, GraphError: as the call itself.
    """
    inner: Any = optimised_model(model) if is_wrapper(model) else model
    runtime: Runtime | None = holder(inner).__dict__.get(RUNTIME)
    if runtime is None:
        raise HawkError("warm_up needs an optimised model: call hawk_compile.optimize first")
    check_prompts(holder(inner), prompts)
    calls = [call for prompt in prompts for call in ([dict(prompt)] if not batches else every_form(inner, prompt))]
    settings = greedily(inner.generation_config)
    before, last = runtime.compilations, runtime.last
    try:
        with deltas_kept(holder(inner)), torch.no_grad():
            for number, call in enumerate(calls):
                progress(Progress(number, len(calls), f"{len(call['input_ids'])} rows"))
                inner.generate(**call, generation_config=settings)
    finally:
        runtime.last = last
    progress(Progress(len(calls), len(calls)))
    return runtime.compilations - before


def greedily(settings: GenerationConfig) -> GenerationConfig:
    """A model's own settings, its cache among them, for a short answer that draws no random number."""
    short = copy.deepcopy(settings)
    short.update(
        max_length=None, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, num_beams=1,
        num_return_sequences=1,
    )  # fmt: skip
    return short


def check_prompts(model: Any, prompts: tuple[Any, ...]) -> None:
    if not prompts:
        raise InputError(
            "warm_up was given no prompt: give one of each kind that will come, as a processor makes it for generate"
        )
    for prompt in prompts:
        if not isinstance(prompt, Mapping) or not isinstance(prompt.get("input_ids"), Tensor):
            raise InputError(
                f"each prompt of warm_up must map names of generate's arguments to values, input_ids [B, S] among "
                f"them, got {type(prompt).__name__}: give what a processor returns with return_tensors=\"pt\""
            )
        if not modalities_of(model, dict(prompt)):
            raise InputError(
                f"a prompt of warm_up holds {', '.join(prompt)} and nothing to prune: give one with an image, a video "
                "or audio"
            )


def every_form(model: Any, prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as it is, as several rows, and as several rows with padding."""
    if len(prompt["input_ids"]) > 1:
        return [dict(prompt), padded(model, prompt)]
    several = twice(prompt)
    return [dict(prompt), several, padded(model, several)]


def twice(prompt: Prompt) -> dict[str, Any]:
    """Every row a second time, with its images."""
    doubled = {}
    for name, value in prompt.items():
        if isinstance(value, Tensor) and value.ndim:
            value = torch.cat([value, value], -2 if name == "position_ids" else 0)
        elif isinstance(value, (list, tuple)):
            value = [*value, *value]
        doubled[name] = value
    return doubled


def padded(model: Any, prompt: Prompt) -> dict[str, Any]:
    """The rows with a slot of padding in front of each."""
    ids = prompt["input_ids"]
    known = model.generation_config.pad_token_id
    filler = {"input_ids": known if isinstance(known, int) else 0, "attention_mask": 0}
    given = {"attention_mask": torch.ones_like(ids), **prompt}
    along = {*PER_TOKEN_INPUTS, *along_prompt(given, *ids.shape)} & given.keys()
    return given | {
        name: nn.functional.pad(given[name], (1, 0), value=filler.get(name, 0)) for name in along
        if isinstance(given[name], Tensor)
    }  # fmt: skip
