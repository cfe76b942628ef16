"""One pruned prefill: sort the inputs, plan, run the compiled graph, hand its keys and values to the caller's cache."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.attention import capturing
from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.features import by_argument, feature_count
from hawk_compile.capture.hooks import refuse_hooks
from hawk_compile.capture.inside import graph_modules
from hawk_compile.capture.merging import taking_features
from hawk_compile.capture.modalities import (
    AUDIO_INPUT,
    asks_for,
    known_ids,
    modalities_of,
    placeholder_ids,
    placeholders_by_modality,
    tokens_of,
    visual_places,
)
from hawk_compile.capture.patches import install_recorders, put_on_body
from hawk_compile.errors import CaptureError
from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import is_any, read_ids
from hawk_compile.plan.plan import Plan, make_plan, on_host
from hawk_compile.plan.quotas import quotas
from hawk_compile.runtime.adapters import refuse_mixed_adapters
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.generation import running
from hawk_compile.runtime.gradients import refuse_gradients
from hawk_compile.runtime.handover import fill_cache, keep_positions, scratch_cache, scratch_layers, shrink
from hawk_compile.runtime.inputs import PromptInputs, prompt_inputs
from hawk_compile.runtime.logits import at_positions, refuse_removed, take_positions
from hawk_compile.runtime.packed import pack_weights, refuse_quantised
from hawk_compile.runtime.recognised import moved_keys
from hawk_compile.runtime.records import PrefillRecord
from hawk_compile.runtime.refusals import (
    refuse_fillers_behind_states,
    refuse_other_layers,
    refuse_padding_among_blocks,
    refuse_quotas_of_audio,
    refuse_unsupported,
)
from hawk_compile.runtime.split import adapt, moved
from hawk_compile.runtime.state import Runtime
from hawk_compile.runtime.surroundings import refuse_surroundings
from hawk_compile.runtime.tracked import opened, spoiled_by_failure, track
from hawk_compile.settings.config import HawkConfig


def run_prefill(model: PreTrainedModel, runtime: Runtime, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """The model's output for a prompt whose visual tokens are pruned.

    Raises:
        UnsupportedCallError, InputError, GraphError: as `hawk_compile.runtime.forward.run`.
    """
    refuse_surroundings(kwargs)
    refuse_unsupported(model, kwargs)
    refuse_mixed_adapters(model, runtime)
    if runtime.scratch_layers is None:
        runtime.scratch_layers = scratch_layers(model)
    if physical_length(kwargs.get("past_key_values")):
        refuse_other_layers(kwargs["past_key_values"], runtime.scratch_layers)
    grad = torch.is_grad_enabled() and (
        tokens_of(kwargs).requires_grad or any(parameter.requires_grad for parameter in model.parameters())
    )
    with torch.no_grad():
        if asks_for(model, kwargs, "output_hidden_states"):
            install_recorders(model.base_model.get_decoder())  # type: ignore[operator]
        kwargs = dict(kwargs)
        places = take_positions(kwargs, tokens_of(kwargs).shape[1])
        inputs = prompt_inputs(model, kwargs, runtime.config.modalities if runtime.config.per_image else ())
        chat = runtime.learn_chat(model)
        plan, whole = plan_of(model, runtime, inputs, chat.form, places)
        if inputs.past and (plan.padded or plan.filled):
            refuse_fillers_behind_states(runtime.scratch_layers)
        if plan.padded or plan.filled:
            refuse_padding_among_blocks(model)
        rule = rule_of(runtime.config, whole)
        result, record = run_graph(model, runtime, forward, inputs, plan, rule, chat.origin)
        if places is not None and record.keep is not None and record.valid is not None:
            result = at_positions(result, places, record.keep, record.valid)
    runtime.note(record, result)
    if grad:
        refuse_gradients(result)
    return result if inputs.return_dict in (None, True) else result.to_tuple()


def plan_of(
    model: PreTrainedModel, runtime: Runtime, inputs: PromptInputs, chat: ChatFormat | None, places: Tensor | None
) -> tuple[Plan, list[str]]:
    """The plan of a call, and the modalities in it that stay whole.

    Args:
        places: [n], positions whose logits the call asks for; None where it asks for none by position.
    """
    config, tokens, generation = runtime.config, inputs.tokens, running.get()
    prompt = None if generation is None else generation.prompt_length
    asked = inputs.question
    if asked is None and generation is not None and generation.question is not None:
        asked = generation.question.repeated(inputs.rows)
    earlier = 0 if inputs.cache is None else int(inputs.cache.get_seq_length())
    if inputs.on_host is None:
        # Placeholders first: a token that was added and never trained may have their embedding.
        wanted = [*placeholder_ids(model), *read_ids(runtime.ids, chat), *sorted(asked.numbers if asked else ())]
        ids, real = on_host(known_ids(model, tokens, wanted), inputs.mask)
    else:
        ids, real = inputs.on_host
    present = modalities_of(model, {**inputs.arguments, "mm_encoder_outputs": inputs.features})
    left = sorted(present - set(config.modalities))
    visual = visual_places(model, ids, present)
    candidates = visual & is_any(ids, placeholder_ids(model, config.modalities)) if left else None
    images = None
    if config.per_image:
        refuse_quotas_of_audio(present & set(config.modalities))
        asked_for = {each: inputs.sizes[each] for each in inputs.sizes if each in config.modalities}
        images = quotas(ids, placeholders_by_modality(model), asked_for, config)
    plan = make_plan(
        ids, visual, real, feature_count(model, inputs.arguments, inputs.features), runtime.ids, config, prompt, images,
        candidates, chat,
        None if asked is None else asked.on_prompt(ids, real, runtime.ids, prompt, earlier),
    )  # fmt: skip
    if places is not None:
        refuse_removed(places, visual if candidates is None else candidates, real, plan)
    return plan.to(tokens.device), left


def run_graph(
    model: PreTrainedModel, runtime: Runtime, forward: Callable[..., Any], inputs: PromptInputs, plan: Plan, rule: str,
    origin: str,
) -> tuple[ModelOutput, PrefillRecord]:
    """(the model's output, what the prefill did); keys and values are in the caller's cache."""
    scratch = scratch_cache(inputs.cache, runtime.scratch_layers or ())
    features = moved(by_argument(model, inputs.features), runtime.device)
    taken = inputs.arguments | {
        "mm_encoder_outputs": features, "attention_mask": mask_for(inputs, plan), "past_key_values": scratch,
        "use_cache": True,
    }  # fmt: skip
    taken = dict(sorted(taken.items()))  # the graph is guarded by their order
    weights = runtime.weights(inputs.tokens.device)

    if runtime.prefill.outdated(model):
        runtime.compile_anew()

    def before_capture() -> None:
        modules = [*graph_modules(model, AUDIO_INPUT in inputs.arguments)]
        refuse_hooks(modules, "a pruned prefill")
        put_on_body(model)
        runtime.prefill.note_forwards(model, modules)
        pack_weights(model)

    def run() -> Any:
        return runtime.prefill.run(
            taking_features(model, forward), taken, inputs.past_mask, plan, weights, inputs.along, before_capture)

    with capturing(model, runtime) as attention:
        try:
            with diagnosed(model):
                result, keep, valid, scores = run()
        except CaptureError:
            refuse_quantised(model)  # since optimize, by what others have made of it
            if not adapt(model, runtime):  # to hooks that came on its modules since, or says why that cannot be
                raise
            with diagnosed(model):
                result, keep, valid, scores = run()
    record = PrefillRecord(
        plan.visual, plan.text, keep, valid, scores, rule, plan.question, runtime.head_weights.origin, inputs.length,
        origin, runtime.prefill.scoring_layer, attention.here, attention.elsewhere)
    runtime.static_length = shrink(inputs.cache, inputs.length - keep.shape[1], runtime.static_length)
    keep_positions(scratch, keep, inputs.past, inputs.length)
    recognised_by = moved_keys(
        scratch, model.config.get_text_config(), keep, valid if plan.filled else None, inputs.mask, inputs.past)
    with spoiled_by_failure(inputs.cache):
        with opened(inputs.cache):
            cache = fill_cache(model, inputs.cache, scratch, inputs.past, inputs.use_cache)
        if cache is not None:
            track(cache, keep, valid if plan.filled else None, inputs.past, inputs.length, inputs.deltas)
    if cache is not None and keep.shape[1] < inputs.length:
        runtime.remember(recognised_by)
    return with_cache(result, cache), record


def with_cache(result: ModelOutput, cache: Cache | None) -> ModelOutput:
    """An output with the caller's cache in the place of the graph's, in itself and in those of parts within it.

    Where the caller has none, nor has the output: beam search reorders whatever it finds there.
    """
    changed: dict[str, Any] = {
        name: cache if name == "past_key_values" else with_cache(value, cache) for name, value in result.items()
        if name == "past_key_values" or isinstance(value, ModelOutput)
    }  # fmt: skip
    return replace(result, **changed)  # type: ignore[type-var]


def mask_for(inputs: PromptInputs, plan: Plan) -> Tensor | None:
    """[B, S] for the graph, or None where it needs none: no padding, no filling, and nothing in the cache."""
    if not (plan.padded or plan.filled or inputs.past_mask is not None):
        return None
    if inputs.mask is not None:
        return inputs.mask
    return torch.ones((inputs.rows, inputs.length), dtype=torch.long, device=inputs.tokens.device)


def rule_of(config: HawkConfig, left: list[str]) -> str:
    """What says how much is removed; `left` are modalities that stay whole."""
    more = []
    if config.budget is not None:
        more.append(f"budget={config.budget}")
    if config.per_image:
        more += [f"min_per_image={config.min_per_image}", f'quota="{config.quota}"']
    if config.bucket > 1:
        more.append(f"bucket={config.bucket}")
    if config.normalize_per == "image":
        more.append('normalize_per="image"')
    if left:
        more.append(f"{' and '.join(left)} not among modalities={config.modalities}")
    return f"ratio={config.ratio:g}" + (f" with {', '.join(more)}" if more else "")
