"""What vLLM calls in every one of its processes before it reads a configuration."""

from typing import Any

from hawk_compile.errors import UnsupportedModelError
from hawk_compile.serving.settings import KEY, serving_config

MODULE = "hawk_compile.serving.vllm.classes"


def register() -> None:
    """Let configurations with `hawk` in them be served by classes of ours; may be called more than once."""
    from vllm.config import ModelConfig

    if getattr(ModelConfig, "_hawk", False):
        return
    verify = ModelConfig._try_verify_and_update_model_config

    def verify_and_prune(self: Any) -> None:
        verify(self)
        if getattr(self.hf_config, KEY, None) is not None:
            serve_pruned(self)

    ModelConfig._try_verify_and_update_model_config = verify_and_prune
    ModelConfig._hawk = True
    register_classes()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        let_cpu_take_positions()


def register_classes() -> None:
    """A class for every multimodal architecture, made when it is asked for."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    for architecture in _MULTIMODAL_MODELS:
        ModelRegistry.register_model(f"Pruned{architecture}", f"{MODULE}:Pruned{architecture}")


def serve_pruned(model: Any) -> None:
    """Change a model's configuration so that it is served pruned.

    Raises:
        ConfigError: settings that a server does not have, or out of their range.
        UnsupportedModelError: a model that cannot be pruned in the engine.
    """
    settings = serving_config(getattr(model.hf_config, KEY))
    name = model.architecture
    remedy = f"leave {KEY} out of hf_overrides"
    from vllm.model_executor.models.registry import ModelRegistry

    if f"Pruned{name}" not in ModelRegistry.models or model.multimodal_config is None:
        raise UnsupportedModelError(f"{name} takes no images in vLLM, so that there is nothing to prune: {remedy}")
    if model.multimodal_config.is_multimodal_pruning_enabled():
        raise UnsupportedModelError(
            f"video_pruning_rate={model.multimodal_config.video_pruning_rate} removes video tokens by itself, and "
            f"{KEY} would prune what is left: give one of them"
        )
    give_axes(model)
    model.multimodal_config.video_pruning_rate = max(float(settings.ratio), 1e-6)
    model.hf_config.architectures = [f"Pruned{name}"]
    model.model_arch_config = model.get_model_arch_config()
    model._architecture = f"Pruned{name}"


def give_axes(model: Any) -> None:
    """Let positions of a model with plain rotary embeddings be carried as those of one with axes: all channels read the
    first axis, so nothing else changes."""
    from vllm.transformers_utils.config import uses_mrope

    if uses_mrope(model.hf_config):
        return
    text = model.hf_text_config
    parameters = getattr(text, "rope_parameters", None) or {}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def one_axis(of_layers: dict[str, Any]) -> dict[str, Any]:
        half = int(head * of_layers.get("partial_rotary_factor", 1.0)) // 2
        return {**of_layers, "mrope_section": [half, 0, 0]}

    by_kind = parameters and all(isinstance(each, dict) for each in parameters.values())  # of layers
    text.rope_parameters = (
        {kind: one_axis(each) for kind, each in parameters.items()} if by_kind else one_axis(parameters)
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
