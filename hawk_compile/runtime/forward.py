"""The forward of an optimised model: which calls are pruned, and how the others read a pruned cache."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.encode import positions_of
from hawk_compile.capture.merging import without_unawaited
from hawk_compile.capture.modalities import (
    PER_TOKEN_INPUTS,
    along_prompt,
    merges_itself,
    modalities_of,
    placeholders_by_modality,
    positions_by_images,
    takes,
    tokens_of,
)
from hawk_compile.compat.models import attention_of
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.adapters import refuse_mixed_adapters
from hawk_compile.runtime.asked import take_question
from hawk_compile.runtime.conversation import conversation_of, note, physical_length
from hawk_compile.runtime.generation import running, step_options
from hawk_compile.runtime.later_images import positions_behind
from hawk_compile.runtime.positions import deltas_after, deltas_of, next_positions
from hawk_compile.runtime.prefill import run_prefill
from hawk_compile.runtime.recognised import refuse_rebuilt
from hawk_compile.runtime.records import PrefillRecord
from hawk_compile.runtime.refusals import refuse_other_cache
from hawk_compile.runtime.split import placed
from hawk_compile.runtime.state import Runtime
from hawk_compile.runtime.surroundings import watchers_around
from hawk_compile.runtime.tracked import TrackedCache, of_slots, opened, physical_mask, refuse_spoiled, track
from hawk_compile.settings.config import MODALITIES

Forward = Callable[..., Any]
MERGED_BEFORE = "inputs_embeds without visual features: if images are merged into them, they cannot be told from text"
STEP_REMEDY = "leave compile_decode out (or, where generate asked for it, give generate disable_compile=True)"


def run(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """One call of an optimised model's forward.

    Raises:
        UnsupportedCallError: a call that pruning does not support; nothing has run.
        InputError: inputs that contradict each other.
        GraphError: the model's graph cannot be pruned.
    """
    refuse_other_cache(kwargs.get("past_key_values"))
    refuse_spoiled(kwargs.get("past_key_values"))
    refuse_rebuilt(kwargs.get("past_key_values"), runtime.moved)
    generation = running.get()
    if generation is not None and generation.repeats:
        kwargs = behind_cache(kwargs)
        generation.repeats = False
    kwargs = without_idle_inputs(model, placed(model, kwargs))
    present = modalities_of(model, kwargs)
    if present & set(runtime.config.modalities):
        return run_prefill(model, runtime, forward, kwargs)
    take_question(kwargs)  # which nothing but pruning asks for
    cache = kwargs.get("past_key_values")
    if physical_length(cache) == 0:
        return run_text(model, runtime, forward, kwargs)
    if isinstance(cache, TrackedCache):
        if present and positions_by_images(model):
            return run_whole_images(model, runtime, forward, cache, kwargs)
        kwargs = by_slots(model, cache, kwargs)
    return step(model, runtime, forward, kwargs)


def behind_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that repeats the whole conversation, cut to what the cache does not hold; its mask covers
    the whole all the same, and pixels as wide as it is long stay as they are."""
    rows, length = tokens_of(kwargs).shape[:2]
    past = int(kwargs["past_key_values"].get_seq_length())
    axes = dict.fromkeys({*PER_TOKEN_INPUTS, *along_prompt(kwargs, rows, length)} - {"attention_mask"}, -1)
    axes["inputs_embeds"] = 1
    cut = {
        name: value.narrow(axis, past, length - past) for name, axis in axes.items()
        if isinstance(value := kwargs.get(name), Tensor) and value.shape[axis] == length
    }  # fmt: skip
    return {**kwargs, **cut}


def without_idle_inputs(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without pixels and frames that no id of a step behind a prompt waits for, which generate hands on.

    Raises:
        UnsupportedCallError: they belong to a prompt, which the model may read them for all the same.
    """
    if not merges_itself(model):
        return kwargs
    generation, past = running.get(), physical_length(kwargs.get("past_key_values"))
    chosen = generation is not None and generation.begun and past > 0 and tokens_of(kwargs).shape[1] == 1
    awaited = without_unawaited(model, kwargs, chosen)
    if generation is not None:
        generation.begun = True
    if awaited is not kwargs and past == 0:
        idle = ", ".join(sorted({*kwargs} - {*awaited}))
        raise UnsupportedCallError(
            f"{idle} were given, and none of input_ids waits for them, so that what {type(model).__name__} does with "
            "them in its own forward is not seen: put its placeholders into the prompt, one for each visual token, or "
            "call hawk_compile.restore(model) to run it whole"
        )
    return awaited


def by_slots(model: PreTrainedModel, cache: TrackedCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call behind a pruned prompt: what covers the whole conversation is cut to the slots."""
    mask, (rows, new_tokens) = kwargs.get("attention_mask"), tokens_of(kwargs).shape[:2]
    whole = int(cache.get_seq_length()) + new_tokens
    cut: dict[str, Any] = {
        name: of_slots(cache, value) for name, value in kwargs.items()
        if name not in ("attention_mask", "position_ids") and isinstance(value, Tensor) and value.ndim == 2
        and value.shape[0] == rows and value.shape[1] == whole != new_tokens
    }  # fmt: skip
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        cut["attention_mask"] = physical_mask(cache, mask, new_tokens)
    if kwargs.get("position_ids") is None and conversation_of(cache).rope_deltas is not None:
        cut["position_ids"] = next_positions(model, cache, mask, new_tokens)
    return {**kwargs, **cut}


def run_whole_images(
    model: PreTrainedModel, runtime: Runtime, forward: Forward, cache: TrackedCache, kwargs: dict[str, Any]
) -> Any:
    """New images that stay whole in a later turn of a conversation, whose offset they change."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        positions = positions_behind(model, cache, kwargs)
    rows, length = tokens_of(kwargs).shape[:2]
    deltas = deltas_after(model, cache, positions, mask, rows, length)
    result = step(model, runtime, forward, by_slots(model, cache, {**kwargs, "position_ids": positions}))
    note(cache, rope_deltas=deltas)
    return result


def run_text(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """The first prompt of a conversation, without features to prune: it runs whole, and the report says so."""
    record = unpruned(model, runtime, kwargs)
    if record.rule == MERGED_BEFORE:
        warnings.warn(
            f"an optimised model was given {MERGED_BEFORE}, and nothing is pruned: give input_ids, and the images "
            "beside them",
            stacklevel=2,
        )
    if not positions_by_images(model):
        result = step(model, runtime, forward, kwargs)
        runtime.note(record, result, kwargs.get("past_key_values"))
        return result
    if kwargs.get("position_ids") is None and modalities_of(model, kwargs):
        with deltas_of(model, None):
            kwargs = {**kwargs, "position_ids": positions_of(model.base_model, kwargs)}
    tokens, positions = tokens_of(kwargs), kwargs.get("position_ids")
    if positions is None:
        with deltas_of(model, None):
            result = step(model, runtime, forward, kwargs)
    else:
        result = step(model, runtime, forward, kwargs)
    cache = runtime.note(record, result, kwargs.get("past_key_values"))
    if physical_length(cache):
        # Nothing was removed, but this conversation's offsets must not be another's.
        rows, length = tokens.shape[:2]
        deltas = deltas_after(model, None, positions, kwargs.get("attention_mask"), rows, length)
        assert cache is not None
        track(cache, torch.empty((rows, 0), dtype=torch.int64, device=tokens.device), None, 0, 0, deltas)
    return result


def step(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """A call without pruning: compiled if it is a decode step and the settings or generate ask for that."""
    options = step_options.get()
    if options is None and runtime.config.compile_decode:
        options = {"backend": runtime.config.backend}
    cache = kwargs.get("past_key_values")
    with opened(cache):
        wanted = options is not None and physical_length(cache) != 0 and tokens_of(kwargs).shape[1] == 1
        if not wanted or watchers_around().any:
            return forward(**kwargs)
        assert options is not None
        refuse_mixed_adapters(model, runtime)
        with diagnosed(model, f"the decode step of {type(model).__name__}", STEP_REMEDY):
            return runtime.step(forward, options).run(kwargs)


def unpruned(model: PreTrainedModel, runtime: Runtime, kwargs: dict[str, Any]) -> PrefillRecord:
    """A record that says why a prefill was not pruned."""
    tokens = tokens_of(kwargs)
    rows, length = tokens.shape[:2]
    if present := sorted(modalities_of(model, kwargs)):
        asked = runtime.config.modalities
        reason = f"the prompt has {' and '.join(present)} only, which is not among modalities={asked}"
    elif kwargs.get("input_ids") is None:
        reason = MERGED_BEFORE
    else:
        reason = "the prompt has no visual features"
    awaited = {} if present else awaited_features(model, kwargs.get("input_ids"))
    nothing = [0] * rows
    attention = attention_of(model.config.get_text_config()) or ""
    return PrefillRecord(
        nothing, nothing, None, None, None, reason, None, runtime.head_weights.origin, length, awaited=awaited,
        prefill_attention=attention, attention=attention,
    )  # fmt: skip


def awaited_features(model: PreTrainedModel, input_ids: Tensor | None) -> dict[str, Tensor]:
    """modality -> whether its placeholders stand in a prompt [B, S]: a bool on the prompt's device, which is not waited
    for."""
    if input_ids is None:
        return {}
    ids = placeholders_by_modality(model, [modality for modality in MODALITIES if takes(model, modality)])
    return {modality: (input_ids == number).any() for modality, number in ids.items() if number is not None}
