"""Of the engine: configurations as they are made, the registry of models, the runner for CPUs."""

from collections.abc import Callable, Iterator, Sequence
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


def runs_in_transformers(architecture: str) -> bool:
    """Whether vLLM serves an architecture by transformers' code."""
    from vllm.model_executor.models.registry import _TRANSFORMERS_BACKEND_MODELS, _TRANSFORMERS_SUPPORTED_MODELS

    return architecture in _TRANSFORMERS_BACKEND_MODELS or architecture in _TRANSFORMERS_SUPPORTED_MODELS


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


DRAFTS_WITHOUT_POSITIONS = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""vLLM's methods of speculative decoding that look a draft up, or read it off hidden states."""


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
    if config.model_config.enable_prompt_embeds:
        raise UnsupportedCallError(
            "enable_prompt_embeds=True lets requests give text as embeddings, which have no ids to find a question in: "
            "leave it out, or hawk out of hf_overrides"
        )
    drafts = config.speculative_config
    if drafts is not None and drafts.method not in DRAFTS_WITHOUT_POSITIONS:
        raise UnsupportedCallError(
            f"speculative decoding by {drafts.method!r} drafts with a model of its own, whose table of positions ends "
            f"where prompts may, and kept tokens have positions beyond: take {' or '.join(DRAFTS_WITHOUT_POSITIONS)}, "
            "or leave hawk out of hf_overrides"
        )
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise UnsupportedCallError(
            "enable_tower_connector_lora=True counts an encoder's tokens by those that are kept, so adapters would "
            "meet other images' tokens: leave it out (adapters of the decoder are served), or hawk out of hf_overrides"
        )


def let_cpu_take_positions(carries: Callable[[Any], bool]) -> None:
    """The runner for CPUs does not turn on what the one for GPUs does when a model is loaded: embeddings that carry
    positions. Nor does it run the encoder before the first request.

    Args:
        carries: sees a model when its weights are there, and says whether its embeddings do. Others stay as they are.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        if carries(self.get_model()):
            self.is_multimodal_pruning_enabled = True

    CPUModelRunner.load_model = load_model


def prunes_by_itself(model: Any) -> bool:
    """Whether vLLM's own pruning of videos (EVS) is on in a loaded model, which then appends positions, that the runner
    for CPUs leaves there without `let_cpu_take_positions`."""
    return bool(getattr(model, "is_multimodal_pruning_enabled", False))


Sized = tuple[str, Any]
"""(modality, what an item's encoder reads)."""

encoder_call = 0
"""How many visual tokens one call of an encoder may see; engines of one process share it."""


def bound_encoder_calls(config: Any, size: Callable[[Any], int]) -> None:
    """Keep a call of the encoder within what memory was measured with.

    The scheduler lets the items of a step be encoded in one call if their embeddings fit
    `max_num_encoder_input_tokens`, and counts those that are kept. Both of vLLM's runners batch the items by one
    function, which gets fewer at a time.

    Args:
        size: how many visual tokens the encoder makes of an item of which some are removed; 0 of others.
    """
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu.mm import encoder_runner

    global encoder_call
    encoder_call = config.scheduler_config.max_num_encoder_input_tokens
    for module in (gpu_model_runner, encoder_runner):
        batched = module.group_and_batch_mm_kwargs
        if not hasattr(batched, "hawk"):
            module.group_and_batch_mm_kwargs = in_parts(batched, size)


def in_parts(batched: Callable[..., Iterator[Any]], size: Callable[[Any], int]) -> Callable[..., Iterator[Any]]:
    """vLLM's function that batches items, each batch within bounds."""

    def within_bounds(items: Sequence[Sized], **options: Any) -> Iterator[Any]:
        for part in parts(items, size, encoder_call):
            yield from batched(part, **options)

    within_bounds.hawk = True  # type: ignore[attr-defined]
    return within_bounds


def parts(items: Sequence[Sized], size: Callable[[Any], int], most: int) -> Iterator[list[Sized]]:
    """Items in their order, of at most `most` together; one that is larger stands alone."""
    part: list[Sized] = []
    total = 0
    for item in items:
        count = size(item[1])
        if part and total + count > most:
            yield part
            part, total = [], 0
        part.append(item)
        total += count
    if part:
        yield part
