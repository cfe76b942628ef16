"""Private names of modules, and of transformers' models, configurations and generate."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file, output_capturing

PREPARE_CACHE = "_prepare_cache_for_generation"
"""(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length): puts generate's cache among the
arguments."""
PREPARE_POSITIONS = "_prepare_position_ids_for_generation"
"""(inputs_tensor, model_kwargs) -> positions of a prompt, with those of images."""
PREPARE_ENCODERS = "_prepare_multimodal_encoder_kwargs_for_generation"
"""(model_kwargs) -> the same, images and videos encoded (`mm_encoder_outputs`)."""
PREFILL = "_prefill"
"""(input_ids, generation_config, model_kwargs, ...): generate's first forward, or several of chunks."""
CANDIDATES = "_get_candidate_generator"
"""(..., model_kwargs=): what drafts tokens for assisted decoding."""
SETTLE = "_prepare_generation_config"
"""(generation_config, **kwargs) -> the settings of a call of generate, from all that may give them, and the rest."""


def let_generate_ask(check: Callable[[Any], None]) -> None:
    """Let every call of generate show its settings, before anything else of it runs.

    Args:
        check: is given a GenerationConfig; what it raises ends the call.
    """
    settle = getattr(GenerationMixin, SETTLE)

    @functools.wraps(settle)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        settled = settle(self, *args, **kwargs)
        check(settled[0])
        return settled

    setattr(GenerationMixin, SETTLE, checked)


def mask_length_of(generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """How many positions the attention mask of a call of generate covers, which leaves out one that masks nothing."""
    mask = model_kwargs.get("attention_mask")
    return getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]


UPLOAD = "_upload_modified_files"
"""(working_dir, ...): sends what save_pretrained has written to the Hub."""

AUDIO_LENGTHS = "_get_feat_extract_output_lengths"
"""A method of audio towers: (frames) -> (frames after convolutions, tokens)."""
COMMIT = "_commit_hash"
"""The commit of the Hub's repository that a configuration came from."""
ORIGINS = (COMMIT, "_name_or_path", "transformers_version", "architectures")
"""What a configuration says of where it came from, and nothing of what is made of it."""


REPLICATE = "_replicate_for_data_parallel"
"""() -> a shallow copy of a module, which nn.DataParallel fills with weights of another device."""
MODULES, PARAMETERS, BUFFERS = "_modules", "_parameters", "_buffers"
"""The attributes of a module that hold its children, and its own weights and buffers, by name."""


def is_tensors_or_hooks(attribute: str) -> bool:
    """Whether a module holds its parameters, buffers or hooks by this name."""
    return attribute in (PARAMETERS, BUFFERS) or attribute.endswith("_hooks") or "_hooks_" in attribute


def file_of(checkpoint: str, name: str) -> str | None:
    """Where a file of a checkpoint lies on this machine; None if it does not. Nothing is downloaded."""
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    return cached_file(checkpoint, name, local_files_only=True, **quiet)  # type: ignore[arg-type]


def image_text_types() -> set[str]:
    """The model types that AutoModelForImageTextToText makes models of."""
    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def run_encoders_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with images and videos encoded, by the method that generate has for it."""
    return getattr(model, PREPARE_ENCODERS)(kwargs)


def positions_for(model: PreTrainedModel, inputs: Any, kwargs: dict[str, Any]) -> Any:
    """The positions of a prompt, by the method that generate has for them."""
    return getattr(model, PREPARE_POSITIONS)(inputs, kwargs)


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation of the module that has this configuration."""
    return config._attn_implementation


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Let the module that has this configuration attend by another implementation, one of our own included."""
    config._attn_implementation = name


def experts_of(config: PretrainedConfig) -> str | None:
    """How the experts of a module that has this configuration run; "eager" is their own loop."""
    return config._experts_implementation


def supports_sdpa(module: PreTrainedModel) -> bool:
    """Whether a module can attend by scaled_dot_product_attention: with its softcaps and sinks, if it has any."""
    return bool(module._supports_sdpa)


def let_configs_answer(ask: Callable[[Any], str | None]) -> property:
    """Let configurations name the attention that `ask` gives for what they would name, where it gives one. Returns what
    answered before."""
    before: property = vars(PretrainedConfig)["_attn_implementation"]
    own_answer: Callable[[Any], Any] = before.fget  # type: ignore[assignment]

    def attention(self: PretrainedConfig) -> Any:
        own = own_answer(self)  # read in any case: a graph is guarded by it
        asked = ask(own)
        return own if asked is None else asked

    put_answer(property(attention, before.fset))
    return before


def put_answer(answer: property) -> None:
    """Let configurations name their attention by this property."""
    PretrainedConfig._attn_implementation = answer  # type: ignore[assignment]


def let_recorders_ask(is_captured: Callable[[], bool]) -> Callable[[], bool]:
    """What the recorders of hidden states ask whether the code that runs is captured; then they record in one place of
    the process, else in one of each thread. Returns what they asked before."""
    before: Callable[[], bool] = output_capturing.is_torchdynamo_compiling
    output_capturing.is_torchdynamo_compiling = is_captured
    return before


def compile_settings_of(model: PreTrainedModel) -> Any:
    """What generate compiles the decode step with, where nobody says otherwise."""
    return model._default_compile_config()  # type: ignore[operator]


def device_mesh_of(model: PreTrainedModel) -> Any:
    """The ranks between which a model's heads are shared."""
    return model._device_mesh


@dataclass(frozen=True)
class Mixer:
    """How a function of modeling files that mixes tokens is called.

    Attributes:
        asks: the argument that asks for the state behind the last token beside the mixed tokens.
        alone: whether these come alone where it does not, or else with None.
        tokens: the dimension along which tokens lie in what it takes and gives, of three dimensions or more; rows
            lie along the first. Arguments of fewer dimensions have no tokens, states [B, H, ...] neither.
        step: the function beside it that takes a state and one token, where a mixer takes no state to begin with.
        renamed: what arguments of `step` are called by the mixer, where that is something else.
        fixed: arguments that make a difference to compiled code alone, and what they are for code that is not.
    """

    asks: str
    alone: bool
    tokens: int = 1
    step: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


MIXERS = {
    "torch_chunk_gated_delta_rule": Mixer("output_final_state", alone=False),
    "chunk_kimi_delta_attention": Mixer("output_final_state", alone=False),
    "mamba2_chunk_scan": Mixer("return_final_states", alone=True),
    "mamba_selective_scan": Mixer(
        "return_last_state", alone=True, tokens=2, step="mamba_selective_state_update",
        renamed={"dt_bias": "delta_bias", "dt_softplus": "delta_softplus"}, fixed={"use_associative_scan": False},
    ),
}  # fmt: skip
"""The functions of modeling files that mix tokens chunk by chunk, or one by one. `inspect.unwrap` leads to the function
without kernel."""
PROMPT_LENGTH = "prefill_length"
"""The attribute of layers of a cache that keep a prompt apart from what follows: its length, where they were told."""
EXTRA_KEYS = {"indexer_keys": "update_indexer", "idx_keys": "update_index"}
"""What layers of a cache hold beside keys and values for each token, and the method that adds to it."""
EXTRA_POSITIONS = "indexer_position_ids"
"""The attribute of layers of a cache that remember the positions of all tokens, [axes, B, length]; None elsewhere."""
