"""vLLM in this process, driven step by step: what a request takes until its first token, and what it holds."""

import gc
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hawk_compile.errors import InputError, UnsupportedModelError
from hawk_compile.serving.settings import KEY, RATIO
from hawk_compile.serving.vllm.compat import engine as compat
from hawk_compile.serving.vllm.compat.processor import named_places
from hawk_compile.tools.checkpoints import read_processor
from hawk_compile.tools.served.measured import Answer, Together
from hawk_compile.tools.served.prompts import Turns

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""vLLM's names."""

FIRST_TOKENS = 2
"""Of a request that is timed to its first: one that ends with it holds nothing any more."""


def check_installed() -> None:
    """Raises UnsupportedModelError where vLLM is not."""
    if find_spec("vllm") is None:
        raise UnsupportedModelError(
            "engine vllm needs vLLM, which is not installed here: run `pip install vllm` in this environment, or leave "
            "--engine out to time the model by itself"
        )


class Engine:
    """One engine.

    Args:
        folder: of a checkpoint.
        hawk: settings as `hf_overrides` has them; None: the plugin stays off.
        options: vLLM's own, as `LLM` takes them.

    Raises:
        InputError: options that vLLM does not take.
    """

    def __init__(self, folder: Path, hawk: dict[str, Any] | None, dtype: str, options: dict[str, Any]):
        # The scheduler is looked into, so it is in this process; vLLM's own log would stand between the tables.
        os.environ.update({"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        from vllm import LLM

        self.pruning = hawk is not None
        self.processor = read_processor(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.placeholders = named_places(config)
        given = {
            "dtype": DTYPES[dtype], "seed": 0, "enable_prefix_caching": True, "enable_mm_processor_stats": True,
            "hf_overrides": {KEY: hawk} if self.pruning else {}, **options,
        }  # fmt: skip
        if "video_pruning_rate" in options:
            compat.let_cpu_take_positions(compat.prunes_by_itself)
        try:
            self.llm = LLM(str(folder), **given)
        except TypeError as error:
            raise InputError(
                f"--vllm must name arguments of vllm.LLM, got {', '.join(options)}: {error}; leave out what "
                "it does not know"
            ) from None

    def close(self) -> None:
        """Give back what the engine holds, so that another may start."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    @property
    def block_size(self) -> int:
        return compat.block_size(self.llm)

    def ask(self, turns: Turns, ratio: float) -> Answer:
        """Time a request that is alone in the engine."""
        free = compat.free_blocks(self.llm)
        compat.encoder_seconds(self.llm)
        started = time.perf_counter()
        self.hand_in([turns], ratio, FIRST_TOKENS)
        while not (outputs := self.llm.llm_engine.step()):
            pass
        seconds = time.perf_counter() - started
        held = free - compat.free_blocks(self.llm)
        first = outputs[0]
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
        ids = first.prompt_token_ids
        visual = sum(token in self.placeholders for token in ids)
        encoder, cached = compat.encoder_seconds(self.llm), first.num_cached_tokens or 0
        return Answer(seconds, encoder, len(ids), visual, cached, held)

    def ask_together(self, requests: Sequence[Turns], ratio: float, tokens: int) -> Together:
        """Time requests that come at once, to the last of so many tokens of each."""
        free = least = compat.free_blocks(self.llm)
        started = time.perf_counter()
        self.hand_in(requests, ratio, tokens)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            least = min(least, compat.free_blocks(self.llm))
        return Together(time.perf_counter() - started, len(requests) * tokens, free - least)

    def hand_in(self, requests: Sequence[Turns], ratio: float, tokens: int) -> None:
        from vllm import SamplingParams

        options = {"mm_processor_kwargs": {RATIO: ratio}} if self.pruning else {}
        for turns in requests:
            prompt = {"prompt": turns.rendered(self.processor), "multi_modal_data": turns.data, **options}
            sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            compat.hand_in(self.llm, prompt, sampling)
