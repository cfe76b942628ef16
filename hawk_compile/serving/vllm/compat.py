"""vLLM's private names and habits, in one place; tests/serving/test_vllm_compat.py says what each must be."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hawk_compile.errors import UnsupportedCallError, UnsupportedModelError
from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import SpecialIds, special_ids_of
from hawk_compile.plan.template import chat_of
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import weights_for

Ask = Callable[..., Any]


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a served model, as this rank has it."""

    first_layer: nn.Module
    width: int
    heads: int
    kv_heads: int
    all_heads: int
    device: torch.device
    dtype: torch.dtype


def decoder_of(model: Any) -> Decoder:
    """Raises UnsupportedModelError where there is no list of layers with attention."""
    text = model.get_language_model()
    inner = getattr(text, "model", text)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(text).__name__} has no list of decoder layers, whose first one could be scored: leave hawk out of "
            "hf_overrides"
        )
    config = model.config.get_text_config()
    attention: Any = next((each for each in layers[0].modules() if hasattr(each, "num_kv_heads")), None)
    weight = next(layers[0].parameters())
    if attention is None:
        raise UnsupportedModelError(
            f"the first decoder layer, {type(layers[0]).__name__}, has no softmax attention, by which visual tokens "
            "are scored: leave hawk out of hf_overrides"
        )
    return Decoder(
        layers[0], config.hidden_size, attention.num_heads, attention.num_kv_heads, config.num_attention_heads,
        weight.device, model_dtype(model),
    )  # fmt: skip


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(each.dtype for each in model.parameters() if each.is_floating_point())


def weights_of_rank(settings: HawkConfig, checkpoint: str, decoder: Decoder) -> Tensor:
    """[H] of this rank's heads, which are H in a row of all."""
    from vllm.distributed import get_tensor_model_parallel_rank

    values = weights_for(settings.used_head_weights, decoder.all_heads, checkpoint).values
    rank = get_tensor_model_parallel_rank()
    return values[rank * decoder.heads : (rank + 1) * decoder.heads]


def all_reduce(scores: Tensor) -> Tensor:
    """The sum over the ranks of a tensor-parallel model."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce(scores) if get_tensor_model_parallel_world_size() > 1 else scores


def from_first_rank(chosen: Tensor) -> Tensor:
    """What the first rank chose: sums over ranks may differ in their last bit."""
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    return get_tp_group().broadcast(chosen, src=0) if get_tensor_model_parallel_world_size() > 1 else chosen


def let_positions_have_axes(model: Any) -> None:
    """Compiled decoders that take the first dimension of positions for the sequence take the last one instead, which is
    the same for [S] and right for [3, S]. Their class is told, in place: it compiles by what it was decorated with."""
    for module in model.modules():
        dims = getattr(module, "_dynamic_arg_dims", None)
        if dims and "positions" in dims:
            dims["positions"] = last_dimension(dims["positions"])


def check_engine(config: Any) -> None:
    """Refuse what an engine is asked to do and cannot while it prunes.

    Raises:
        UnsupportedCallError: such an engine.
    """
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise UnsupportedCallError(
            f"pipeline_parallel_size={stages} gives layers to engines that do not see which tokens were kept, nor "
            "their positions: leave it out and take tensor_parallel_size, or leave hawk out of hf_overrides"
        )
    if config.model_config.multimodal_config.mm_encoder_only or getattr(config, "ec_transfer_config", None) is not None:
        raise UnsupportedCallError(
            "an engine that runs the vision encoder alone has no decoder layer to score with: leave mm_encoder_only "
            "and ec_transfer_config out, or hawk out of hf_overrides"
        )


def check_axes(model: Any) -> None:
    """Refuse a decoder whose rotary embeddings would read positions with axes as those of more tokens.

    Raises:
        UnsupportedModelError: such a decoder.
    """
    for name, module in model.get_language_model().named_modules():
        if name.rpartition(".")[2] == "rotary_emb" and getattr(module, "mrope_section", None) is None:
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, which has no axes of position, so that the original positions "
                "of kept tokens cannot be carried: this checkpoint cannot be served pruned; leave hawk out of "
                "hf_overrides"
            )


def last_dimension(dims: Any) -> Any:
    return dict.fromkeys((-1,), next(iter(dims.values()))) if isinstance(dims, dict) else -1


def lone_feature(kwargs: dict[str, Any], index: int, visual: Tensor) -> Any:
    """One item by itself, at the start of a prompt: what a model's rule for positions reads of it."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    modality = "video" if any("video" in name for name in kwargs) else "image"
    data = {
        name: MultiModalFieldElem(data=value[index].cpu(), field=MultiModalBatchedField())
        for name, value in kwargs.items()
        if name.endswith("grid_thw") or name == "second_per_grid_ts"
    }
    mask = None if bool(visual.all()) else visual
    place = PlaceholderRange(offset=0, length=len(visual), is_embed=mask)
    return MultiModalFeatureSpec(data=MultiModalKwargsItem(data), modality=modality, identifier="", mm_position=place)


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


def without_video_pruning(context: Any) -> Any:
    """A processor's context in which vLLM's own pruning of videos is off, whose switch `plugin.py` uses."""
    held = copy.copy(context.model_config)
    held.multimodal_config = copy.copy(held.multimodal_config)
    held.multimodal_config.video_pruning_rate = None
    return replace(context, model_config=held)


def let_cpu_take_positions() -> None:
    """The runner for CPUs does not turn on what the one for GPUs does when a model is loaded: embeddings that carry
    positions."""
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        held = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = bool(
            held is not None and held.is_multimodal_pruning_enabled() and supports_multimodal_pruning(self.get_model())
        )

    CPUModelRunner.load_model = load_model


def when_verified(call: Callable[[Any], None]) -> bool:
    """Let a function see every model's configuration as soon as vLLM has made and verified it; False if one does."""
    from vllm.config import ModelConfig

    verify = ModelConfig._try_verify_and_update_model_config
    if getattr(verify, "hawk", False):
        return False

    def verify_and_call(self: Any) -> None:
        verify(self)
        call(self)

    verify_and_call.hawk = True  # type: ignore[attr-defined]
    ModelConfig._try_verify_and_update_model_config = verify_and_call
    return True


def multimodal_architectures() -> list[str]:
    """Names of the architectures that take images, videos or audio."""
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    return list(_MULTIMODAL_MODELS)


def name_architecture(model: Any, name: str) -> None:
    """Let a configuration be served by another class of the registry."""
    model.hf_config.architectures = [name]
    model.model_arch_config = model.get_model_arch_config()
    model._architecture = name


def give_processor(served: Any, base: Any, wrap: Callable[[Any], Any]) -> None:
    """Let a class that is served have the processor of another one, wrapped."""
    factory = base._processor_factory
    served._processor_factory = replace(
        factory, processor=lambda *args, **kwargs: wrap(factory.processor(*args, **kwargs))
    )


def with_module(module: nn.Module, path: list[str], other: nn.Module) -> nn.Module:
    """A twin of a module that shares all of it but the module at `path`."""
    twin = copy.copy(module)
    children: dict[str, Any] = dict(module._modules)
    head, *rest = path
    children[head] = with_module(children[head], rest, other) if rest else other
    twin.__dict__["_modules"] = children
    return twin


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

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        self.applied(mm_res.prompt_updates)
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]

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

    def applied(self, prompt_updates: Mapping[str, Any]) -> None:
        """Sees what becomes of the items of a prompt, cached ones too."""
