"""Of a checkpoint's processor in vLLM: the methods that prepare an item, and what is known of its chats."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import SpecialIds, special_ids_of
from hawk_compile.plan.template import chat_of
from hawk_compile.settings.config import HawkConfig

Ask = Callable[..., Any]


class ProcessorHooks:
    """The methods of vLLM's processors that a processor of ours extends, under names of our own."""

    def _get_mm_hashes(self, inputs: Any) -> Any:
        return self.hashes(super()._get_mm_hashes, inputs)  # type: ignore[misc]

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        return self.kwargs_of_missing(super()._get_cache_missing_processor_kwargs, inputs, mm_is_cached)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        return super()._apply_hf_processor_main(mm_items=mm_items, hf_kwargs=self.checkpoints_own(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        return super()._get_mm_fields_config(hf_inputs, self.checkpoints_own(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        ask = super()._get_mm_prompt_updates  # type: ignore[misc]
        return self.prompt_updates(ask, mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        made = super()._recompute_cached_prompt_update(cached_update, new_item_idx)  # type: ignore[misc]
        return self.recomputed(cached_update, made)

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        self.applied(mm_res.prompt_updates)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]

    def hashes_of(self, inputs: Any) -> Any:
        """The identity of each item, by modality, as every cache has it."""
        return self._get_mm_hashes(inputs)

    def updates_of(self, mm_items: Any, kwargs: Any, out_mm_kwargs: Any) -> Any:
        """What a checkpoint's placeholders become; each is worked out when it is read."""
        return self._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[attr-defined]

    def hashes(self, ask: Ask, inputs: Any) -> Any:
        """The identity of each item, by modality."""
        return ask(inputs)

    def kwargs_of_missing(self, ask: Ask, inputs: Any, mm_is_cached: Any) -> Any:
        """The keyword arguments of the items that the cache does not hold."""
        return ask(inputs, mm_is_cached)

    def checkpoints_own(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those keyword arguments that the checkpoint's own processor knows."""
        return dict(kwargs)

    def prompt_updates(self, ask: Ask, mm_items: Any, kwargs_of_request: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        """What becomes of each item's placeholder, by modality."""
        return ask(mm_items, kwargs_of_request, out_mm_kwargs)

    def recomputed(self, cached: Any, update: Any) -> Any:
        """What becomes of an item that the cache holds, at another place among the items of its prompt."""
        return update

    def applied(self, prompt_updates: Mapping[str, Any]) -> None:
        """Sees what becomes of the items of a prompt, cached ones too."""


def give_processor(served: Any, base: Any, wrap: Callable[[Any], Any]) -> None:
    """Let a class that is served have the processor of another one, wrapped."""
    factory = base._processor_factory
    served._processor_factory = replace(
        factory, processor=lambda *args, **kwargs: wrap(factory.processor(*args, **kwargs))
    )


PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""What configurations call the ids that stand for visual tokens."""

SOUNDS = ("audio_token_id", "audio_token_index")
"""And for audio."""


def named_places(config: Any, names: Sequence[str] = PLACEHOLDERS) -> set[int]:
    """Those ids of a checkpoint that its configuration names."""
    return {number for name in names if isinstance(number := getattr(config, name, None), int)}


def why_no_text_inside(model: Any) -> str:
    """Why a model would not read text as text at a place of an item, in whose stead it stands there; empty: it would.

    Args:
        model: a ModelConfig.
    """
    if model.is_mm_prefix_lm:
        return "all places of one see each other both ways"
    if model.requires_raw_input_tokens or getattr(model.hf_text_config, "hidden_size_per_layer_input", 0):
        return "the decoder reads ids beside embeddings, which are the same at all places of one"
    return ""


def without_video_pruning(context: Any) -> Any:
    """A processor's context in which vLLM's own pruning of videos is off, whose switch `plugin.py` uses."""
    held = copy.copy(context.model_config)
    held.multimodal_config = copy.copy(held.multimodal_config)
    held.multimodal_config.video_pruning_rate = None
    return replace(context, model_config=held)


def chat_and_ids(info: Any, settings: HawkConfig) -> tuple[SpecialIds, ChatFormat | None]:
    """What says where users' texts stand in a served checkpoint's prompts."""
    config = info.get_hf_config()
    generation = GenerationConfig(**generation_ids(info))
    ids = special_ids_of(config, generation, settings)
    chosen = settings.end_of_turn_token_id is not None
    source = None if chosen else with_template(info)
    return ids, chat_of(source, "", ids.end_of_turn, chosen).form


def generation_ids(info: Any) -> dict[str, Any]:
    known = info.ctx.model_config.try_get_generation_config()
    return {name: known[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id") if name in known}


def with_template(info: Any) -> Any:
    """The processor or the tokenizer, whichever has the chat template."""
    tokenizer = info.get_tokenizer()
    processor = info.get_hf_processor()
    if getattr(processor, "chat_template", None) and not getattr(tokenizer, "chat_template", None):
        return SimpleNamespace(
            tokenizer=tokenizer, chat_template=processor.chat_template,
            apply_chat_template=processor.apply_chat_template,
        )  # fmt: skip
    return tokenizer
