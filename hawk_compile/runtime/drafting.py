"""Assisted decoding: a prompt is prefilled alone, and what is drafted begins behind it.

generate puts the first draft behind the prompt and prefills both at once. Of a prompt that is pruned, the draft would
vote; so the first round has none. Behind a filled cache generate would run the whole conversation again; its first
forward is cut to what the cache does not hold (`Generation.repeats`).

A model that drafts reads the prompt once, in a call of its own: with the images where it is of the target's kind (from
generate it would get none), as text elsewhere. What it drafts changes how long an answer takes, never the answer.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import AssistedCandidateGenerator
from transformers.generation.candidate_generator import (
    AssistedCandidateGeneratorDifferentTokenizers,
    EarlyExitCandidateGenerator,
)

from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.asked import AskedQuestion
from hawk_compile.runtime.state import RUNTIME

OF_TEXT = ("attention_mask", "use_cache", "logits_to_keep")
"""The arguments of a target that its assistant is given, whatever it is; images and positions it gets of its own."""
OWN = ("input_ids", "inputs_embeds", "position_ids", "labels", "past_key_values", *OF_TEXT)
"""Arguments of generate that are not handed on to an assistant's forward."""


def refuse_drafts(model: PreTrainedModel, generation_config: Any) -> None:
    """Refuse what drafts from what a pruned prompt has not.

    Raises:
        UnsupportedCallError: as said.
    """
    config = model.base_model.config
    layers = generation_config.assistant_early_exit
    if layers is not None and not hasattr(config, "num_hidden_layers"):
        raise UnsupportedCallError(
            f"assistant_early_exit={layers}: transformers sets num_hidden_layers of the model's own config for it, and "
            f"{type(config).__name__} has none (its text config has), optimised or not: leave it out, or draft by "
            "assistant_model or prompt_lookup_num_tokens"
        )
    named = [name for name, asked in (
        ("use_mtp", getattr(generation_config, "use_mtp", False)),
        ("speculation_type", getattr(generation_config, "speculation_type", None)),
    ) if asked]  # fmt: skip
    if named:
        raise from_states(named[0])


def from_states(name: str) -> UnsupportedCallError:
    return UnsupportedCallError(
        f"{name} drafts from the hidden states, or the keys, of every token of the conversation, of which a pruned one "
        "has those that were kept only: draft by an assistant_model that reads the prompt itself, or by "
        "prompt_lookup_num_tokens"
    )


def begin_behind_prompt(
    model: PreTrainedModel, generator: Any, prompt: Tensor, inputs: dict[str, Any], question: AskedQuestion | None,
    shown: bool,
) -> None:
    """Let a candidate generator draft nothing in its first round, and begin behind the prompt in the second.

    Args:
        prompt: [1, S].
        inputs: the arguments of generate by name, its images not encoded.
        question: what the call says of who votes.
        shown: whether an assistant may be shown the images among them: those of all of the prompt's placeholders.

    Raises:
        UnsupportedCallError: a generator that drafts from hidden states of the prompt.
    """
    if getattr(generator, "requires_model_outputs", False):
        raise from_states(type(generator).__name__)
    draft = generator.get_candidates

    def nothing(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        generator.get_candidates = behind
        return input_ids, None

    def behind(input_ids: Tensor, **kwargs: Any) -> Any:
        generator.get_candidates = draft
        if isinstance(generator, AssistedCandidateGenerator):
            read_prompt(model, generator, prompt, inputs if shown else {}, question)
        return draft(input_ids, **kwargs)

    generator.get_candidates = nothing


def read_prompt(
    model: PreTrainedModel, generator: Any, prompt: Tensor, inputs: dict[str, Any], question: AskedQuestion | None
) -> None:
    """Let the model that drafts read the prompt, once, on the cache that it goes on with.

    One with another tokenizer reads it as the generator translates it, one that exits early as its first draft.
    """
    assistant, arguments = generator.assistant_model, generator.assistant_kwargs
    mask = arguments.get("attention_mask")
    if isinstance(generator, (AssistedCandidateGeneratorDifferentTokenizers, EarlyExitCandidateGenerator)) or (
        not prompt.shape[1]
    ):
        if mask is not None:  # of a single row: nothing in it is padding that matters to a draft
            del arguments["attention_mask"]
        return
    cache = DynamicCache(config=assistant.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    named = inspect.signature(type(assistant).forward).parameters
    given = {**arguments, **(images_for(assistant, inputs) if alike(model, assistant, inputs) else {})}
    taken = {name: value for name, value in given.items() if name in named}
    if question is not None and RUNTIME in vars(assistant):
        taken |= question.arguments()
    assistant(**{**taken, "input_ids": prompt.to(assistant.device), "past_key_values": cache, "use_cache": True})
    arguments["past_key_values"] = cache


def images_for(assistant: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The images among the arguments of generate, and what is said of them, on the device of an assistant."""
    return {
        name: value.to(assistant.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        if name not in OWN and isinstance(value, (Tensor, list, dict))
    }  # fmt: skip


def alike(model: PreTrainedModel, assistant: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether an assistant takes the images of a call as its target does: one of the same kind, and, where they are
    encoded already, of the same width."""
    if inputs.get("inputs_embeds") is not None:
        return False
    same = assistant.config.model_type == model.config.model_type
    sizes = [each.config.get_text_config().hidden_size for each in (model, assistant)]
    return same and (inputs.get("mm_encoder_outputs") is None or sizes[0] == sizes[1])
