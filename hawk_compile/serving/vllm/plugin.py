"""What vLLM calls in every one of its processes before it reads a configuration."""

import logging
from typing import Any

from hawk_compile.errors import ConfigError, UnsupportedModelError
from hawk_compile.serving.settings import KEY, RATIO, serving_config
from hawk_compile.serving.vllm.compat.engine import (
    let_cpu_take_positions,
    multimodal_architectures,
    name_architecture,
    runs_in_transformers,
    when_verified,
)
from hawk_compile.serving.vllm.positions import AXES, PLAIN
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import weights_for

LOG = logging.getLogger("vllm.hawk")
MODULE = "hawk_compile.serving.vllm.classes"
lacking: list[str] = []
"""What a vLLM has not that the plugin needs."""


def register() -> None:
    """Let configurations with `hawk` in them be served by classes of ours; may be called more than once.

    A vLLM that lacks what this needs goes on without it, and says so: it may not be about to prune at all.
    """
    try:
        if when_verified(serve_if_asked):
            offer_classes()
    except (ImportError, AttributeError) as error:
        lacking.append(str(error))
        LOG.error(
            "hawk: nothing can be pruned, since this vLLM has not what the plugin needs (%s): take vLLM 0.32, or a "
            "later hawk-compile",
            error,
        )


def offer_classes() -> None:
    """Put the classes of ours into vLLM's registry, and let the runner for CPUs serve them."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for architecture in multimodal_architectures():
        ModelRegistry.register_model(f"Pruned{architecture}", f"{MODULE}:Pruned{architecture}")
    if current_platform.is_cpu():
        let_cpu_take_positions(is_pruned)


def is_pruned(model: Any) -> bool:
    """Whether a loaded model is one of ours, which is tried then: a CPU measures no memory with images.

    By what it has: others are loaded without a line of this package beyond this one.
    """
    ours = hasattr(model, "hawk_head_weights")
    if ours:
        model.probe()
    return ours


def serve_if_asked(model: Any) -> None:
    """Change a model's configuration if it asks for it."""
    if getattr(model.hf_config, KEY, None) is not None:
        serve_pruned(model)


def serve_pruned(model: Any) -> None:
    """Change a model's configuration so that it is served pruned.

    Raises:
        ConfigError: settings that a server does not have, or out of their range.
        UnsupportedModelError: a model that cannot be pruned in the engine.
    """
    settings = serving_config(getattr(model.hf_config, KEY))
    name = model.architecture
    refuse_unserved(model)
    check_head_weights(settings, model)
    give_axes(model)
    model.multimodal_config.video_pruning_rate = max(float(settings.ratio), 1e-6)
    name_architecture(model, f"Pruned{name}")
    LOG.info("hawk: %s is served pruned, with %s", name, getattr(model.hf_config, KEY))


def refuse_unserved(model: Any) -> None:
    """Refuse a checkpoint, or what an engine is asked to do with it, that is not served pruned.

    Raises:
        UnsupportedModelError: such a checkpoint.
        ConfigError: a ratio where a server has none.
    """
    name = model.architecture
    remedy = f"leave {KEY} out of hf_overrides"
    if lacking:
        raise UnsupportedModelError(
            f"this vLLM has not what pruning in it needs ({lacking[0]}): take vLLM 0.32, or a later hawk-compile; or "
            f"{remedy}"
        )
    from vllm.model_executor.models.registry import ModelRegistry

    if model.multimodal_config is None:
        raise UnsupportedModelError(f"{name} takes no images in vLLM, so that there is nothing to prune: {remedy}")
    if model.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} reads images by cross-attention, so that no visual token stands in a prompt, where it could be "
            f"removed: {remedy}"
        )
    if model.runner_type == "pooling":
        raise UnsupportedModelError(
            f"runner='pooling' answers with what is pooled of all tokens of a prompt, visual ones too, and what it is "
            f"worth with some of them removed was not compared with anything: {remedy}"
        )
    if model.is_diffusion:
        raise UnsupportedModelError(
            f"{name} draws its answers in blocks, whose positions behind a prompt with some of its tokens removed were "
            f"not compared with anything: {remedy}"
        )
    if runs_in_transformers(name):
        raise UnsupportedModelError(
            f"vLLM has no model of its own for this checkpoint and runs transformers' code ({name}), whose layers get "
            f"their positions ready made, so that they cannot be scored without: {remedy}"
        )
    if f"Pruned{name}" not in ModelRegistry.models:
        raise UnsupportedModelError(
            f"{name} is not among the multimodal models of vLLM's registry, which classes are offered for: {remedy}"
        )
    if model.multimodal_config.is_multimodal_pruning_enabled():
        raise UnsupportedModelError(
            f"video_pruning_rate={model.multimodal_config.video_pruning_rate} removes video tokens by itself, and "
            f"{KEY} would prune what is left: give one of them"
        )
    if RATIO in (model.multimodal_config.mm_processor_kwargs or {}):
        raise ConfigError(
            f"mm_processor_kwargs of a server has {RATIO}, which is read of requests alone: give the server's own "
            f"as ratio in {KEY} of hf_overrides"
        )


def check_head_weights(settings: HawkConfig, model: Any) -> None:
    """Refuse head weights that do not fit where the client can read it: ranks, which read them again, are processes of
    their own, whose reasons stand in the log alone.

    Raises:
        HeadWeightsError: of a wrong length, out of their range, in no file.
    """
    heads = getattr(model.hf_text_config, "num_attention_heads", None)
    if isinstance(heads, int):
        weights_for(settings.used_head_weights, heads, model.model)


def give_axes(model: Any) -> None:
    """Let positions of a model with plain rotary embeddings be carried as those of one with axes. Its decoder gets one
    of them (`PrunedModel.forward`), so that nothing of it changes.

    Raises:
        UnsupportedModelError: positions with more axes than travel with the embeddings.
    """
    from vllm.transformers_utils.config import mrope_num_dims, uses_mrope

    if not uses_mrope(model.hf_config):
        model.hf_config.mrope_section = list(PLAIN)
    elif (axes := mrope_num_dims(model.hf_config)) != AXES:
        raise UnsupportedModelError(
            f"positions of this checkpoint have {axes} axes, and {AXES} travel with visual tokens: it cannot be served "
            f"pruned; leave {KEY} out of hf_overrides"
        )
