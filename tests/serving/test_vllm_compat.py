"""vLLM's names that the plugin uses and nobody promised: each is there, takes what we give and does what we need.

A new vLLM that changes one fails here, by its name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

QWEN = "Qwen2_5_VLForConditionalGeneration"


@pytest.fixture(autouse=True, scope="module")
def plugin_is_found() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_configurations_are_verified_by_a_method_of_their_own() -> None:
    from vllm.config import ModelConfig, MultiModalConfig

    verify = ModelConfig._try_verify_and_update_model_config
    assert not parameters(verify) and verify.hawk  # ours
    made = inspect.getsource(ModelConfig.__post_init__)
    for line in ("self._try_verify_and_update_model_config()", "self.model_arch_config =", "self._architecture ="):
        assert line in made
    assert {"hf_config", "multimodal_config"} <= {each.name for each in dataclasses.fields(ModelConfig)}
    assert not parameters(ModelConfig.get_model_arch_config) and not parameters(ModelConfig.try_get_generation_config)
    held = {each.name for each in dataclasses.fields(MultiModalConfig)}
    assert {"video_pruning_rate", "mm_encoder_only"} <= held


def test_embeddings_carry_positions_where_videos_are_pruned() -> None:
    from vllm.config import MultiModalConfig

    assert MultiModalConfig(video_pruning_rate=1e-6).is_multimodal_pruning_enabled()
    assert not MultiModalConfig().is_multimodal_pruning_enabled()


def test_the_registry_has_classes_by_architecture() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    from hawk_compile.serving.vllm.compat.engine import multimodal_architectures

    assert QWEN in multimodal_architectures() and "LlamaForCausalLM" not in multimodal_architectures()
    assert ModelRegistry.models[QWEN].load_model_cls().__name__ == QWEN
    assert f"Pruned{QWEN}" in ModelRegistry.models


def test_a_class_has_a_factory_for_its_processor() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    factory = ModelRegistry.models[QWEN].load_model_cls()._processor_factory
    assert "processor" in {each.name for each in dataclasses.fields(factory)}
    pruned = ModelRegistry.models[f"Pruned{QWEN}"].load_model_cls()
    assert pruned._processor_factory.processor is not factory.processor
    assert pruned._processor_factory.info is factory.info


def test_the_runner_for_cpus_asks_for_positions_when_it_is_told() -> None:
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert issubclass(CPUModelRunner, GPUModelRunner) and parameters(supports_multimodal_pruning) == ["model"]
    assert "self.is_multimodal_pruning_enabled" in inspect.getsource(GPUModelRunner.load_model)
    assert "recompute_mrope_positions" in inspect.getsource(GPUModelRunner)


@pytest.mark.parametrize("module", ["gpu_model_runner", "gpu.mm.encoder_runner"])
def test_both_runners_batch_items_for_the_encoder_by_one_function(module: str) -> None:
    from vllm.config import SchedulerConfig
    from vllm.multimodal.utils import group_and_batch_mm_kwargs

    runner = importlib.import_module(f"vllm.v1.worker.{module}")
    source = inspect.getsource(runner)
    assert "in group_and_batch_mm_kwargs(" in source and hasattr(runner, "group_and_batch_mm_kwargs")
    assert parameters(group_and_batch_mm_kwargs) == ["mm_kwargs", "device", "pin_memory"]
    assert "max_num_encoder_input_tokens" in {each.name for each in dataclasses.fields(SchedulerConfig)}


def test_adapters_take_the_places_of_modules() -> None:
    """The base weights score because what was taken when a model was made is still the base."""
    from vllm.lora.model_manager import LoRAModelManager

    assert "replace_submodule(self.model, module_name, new_module)" in inspect.getsource(LoRAModelManager)


@pytest.mark.parametrize(("name", "takes"), [
    ("_get_mm_hashes", ["inputs"]),
    ("_get_cache_missing_processor_kwargs", ["inputs", "mm_is_cached"]),
    ("_apply_hf_processor_main", ["mm_items", "hf_kwargs"]),
    ("_get_mm_fields_config", ["hf_inputs", "hf_processor_mm_kwargs"]),
    ("_get_mm_prompt_updates", ["mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"]),
    ("_maybe_apply_prompt_updates", ["mm_items", "mm_res"]),
    ("_get_prompt_updates", ["mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"]),
])  # fmt: skip
def test_a_processor_prepares_items_by_these_methods(name: str, takes: list[str]) -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor

    assert parameters(getattr(BaseMultiModalProcessor, name)) == takes


def test_the_cache_of_processed_items_forgets_one() -> None:
    from vllm.multimodal.cache.base import BaseMultiModalProcessorCache
    from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
    from vllm.multimodal.processing.inputs import ProcessorInputs

    assert parameters(BaseMultiModalProcessorCache.invalidate) == ["mm_hash"]
    assert LruKeyReplicatedSenderCache.invalidate is not BaseMultiModalProcessorCache.invalidate
    assert "cache" in {each.name for each in dataclasses.fields(ProcessorInputs)}


def test_a_processor_is_asked_by_these_names() -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor, ProcessorInputs, PromptUpdateDetails
    from vllm.multimodal.processing.processor import ResolvedPromptUpdate, iter_token_matches

    assert parameters(BaseMultiModalProcessor.apply) == ["inputs", "timing_ctx"]
    assert "self.get_dummy_inputs(" in inspect.getsource(BaseMultiModalProcessor.get_dummy_mm_inputs)
    read = {"prompt", "mm_data_items", "hf_processor_mm_kwargs"}
    assert read <= {each.name for each in dataclasses.fields(ProcessorInputs)}
    assert [(match.start_idx, match.end_idx) for match in iter_token_matches([1, 6, 6, 2], [6, 6])] == [(1, 3)]
    assert [each.name for each in dataclasses.fields(PromptUpdateDetails)] == ["full", "is_embed"]
    assert parameters(ResolvedPromptUpdate.with_content) == ["content"]


def test_a_model_is_asked_by_these_names() -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsMultiModalPruning

    assert parameters(SupportsMRoPE.get_mrope_input_positions) == ["input_tokens", "mm_features"]
    kept = inspect.getsource(Attention.__init__)
    assert all(f"self.{name} = {name}" in kept for name in ("num_heads", "num_kv_heads"))
    asked = ["input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens"]
    assert parameters(SupportsMultiModalPruning.recompute_mrope_positions) == asked
    assert parameters(SupportsMultiModal.embed_multimodal) == ["kwargs"]
    assert not parameters(SupportsMultiModal.get_language_model) and hasattr(AttentionLayerBase, "get_kv_cache_spec")
    assert issubclass(ParallelLMHead, VocabParallelEmbedding)
    assert not parameters(RotaryEmbeddingBase._compute_cos_sin_cache)
    made = inspect.getsource(RotaryEmbeddingBase.__init__)
    assert "cos_sin_cache" in made and "self.max_position_embeddings" in made


def test_methods_that_draft_without_positions_have_these_names() -> None:
    from vllm.config import VllmConfig
    from vllm.config.speculative import SpeculativeMethod

    from hawk_compile.serving.vllm.compat.engine import DRAFTS_WITHOUT_POSITIONS

    assert {f"'{name}'" for name in DRAFTS_WITHOUT_POSITIONS} <= set(re.findall(r"'\w+'", str(SpeculativeMethod)))
    assert "speculative_config" in {each.name for each in dataclasses.fields(VllmConfig)}


def test_an_encoder_that_is_captured_has_modalities() -> None:
    from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
    from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

    assert not parameters(SupportsEncoderCudaGraph.get_encoder_cudagraph_config)
    assert "modalities" in {each.name for each in dataclasses.fields(EncoderCudaGraphConfig)}


def test_items_travel_with_fields_and_places() -> None:
    from hawk_compile.serving.vllm.compat.model import lone_feature

    feature = lone_feature({"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 6]])}, 1, torch.ones(3, dtype=torch.bool))
    assert feature.data["image_grid_thw"].data.tolist() == [1, 2, 6] and feature.modality == "image"
    assert feature.mm_position.get_num_embeds() == 3 and feature.mm_position.extract_embeds_range() == [(0, 2)]
    with_text = lone_feature({}, 0, torch.tensor([True, False, True]))
    assert with_text.mm_position.extract_embeds_range() == [(0, 0), (2, 2)]


def test_axes_of_position_stand_in_a_configuration_or_beside_its_rope() -> None:
    """Beside it, runners carry positions with axes, and rotary embeddings are made as without."""
    from transformers import LlamaConfig, LlavaConfig
    from vllm.transformers_utils.config import mrope_num_dims, uses_mrope

    from hawk_compile.serving.vllm.positions import AXES, PLAIN

    config = LlavaConfig(text_config=LlamaConfig())
    assert not uses_mrope(config)
    config.mrope_section = list(PLAIN)
    assert uses_mrope(config) and mrope_num_dims(config) == AXES and not uses_mrope(config.get_text_config())


def test_an_engine_in_this_process_is_looked_into() -> None:
    """By `bench`; tests/serving/test_vllm_bench.py has one that runs."""
    from vllm import LLM
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    assert parameters(LLM._preprocess_cmpl)[0] == "prompts" and "self.request_counter" in inspect.getsource(
        LLM._add_request
    )
    assert parameters(LLMEngine.add_request)[:3] == ["request_id", "prompt", "params"]
    assert not parameters(BlockPool.get_num_free_blocks) and not parameters(Worker.get_encoder_timing_stats)
