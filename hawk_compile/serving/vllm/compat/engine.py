"""Of the engine: configurations as they are made, the registry of models, the runner for CPUs."""

from collections.abc import Callable
from typing import Any

from hawk_compile.errors import UnsupportedCallError


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


def prunes_videos(architecture: str) -> bool:
    """Whether vLLM's own pruning of videos (EVS) knows an architecture of its registry."""
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    return known is not None and bool(getattr(known.load_model_cls(), "supports_multimodal_pruning", False))


def hand_in(llm: Any, prompt: Any, sampling: Any) -> None:
    """Give an engine in this process a request, of which each of its steps then tells the tokens: `LLM.enqueue` has it
    tell the last alone."""
    (rendered,) = llm._preprocess_cmpl([prompt])
    llm.llm_engine.add_request(str(next(llm.request_counter)), rendered, sampling)


def free_blocks(llm: Any) -> int:
    """Blocks of the key-value cache that no request holds, as the scheduler of an engine in this process counts them;
    what its metric `vllm:kv_cache_usage_perc` is made from."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def block_size(llm: Any) -> int:
    """Tokens of a block of the key-value cache."""
    return llm.llm_engine.vllm_config.cache_config.block_size


def encoder_seconds(llm: Any) -> float:
    """What the encoder took since this was last asked, of an engine with `enable_mm_processor_stats`; the most that a
    worker says, since they wait for each other."""
    of_workers = llm.collective_rpc("get_encoder_timing_stats")
    return max(sum(request["encoder_forward_secs"] for request in worker.values()) for worker in of_workers)


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
