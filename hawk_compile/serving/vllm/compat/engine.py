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
