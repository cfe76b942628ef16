"""vLLM and `optimize` on the same prompts: ids and log-probabilities of what both answer."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import hawk_compile
from hawk_compile.tools.demo.scenes import pick_questions
from tests.serving.cases import Asked

TOKENS = 4
ALONE: dict[str, Any] = {"question": "own", "quota": "image", "normalize_per": "image"}
"""The settings with which `optimize` prunes every picture by itself, as a server does."""
BOTH_WAYS = "token_type_ids"
"""Says which visual tokens see each other both ways. vLLM's attention for CPUs has no such masks, for any model: it
differs from Hugging Face with these ids, pruned or not, and agrees with it without them."""


@dataclass(frozen=True)
class Prompt(Asked):
    """One turn with pictures, each in front of a question of its own."""

    images: list[Image.Image]
    texts: list[str]

    def rendered(self, processor: Any) -> str:
        parts = [part for text in self.texts for part in ({"type": "image"}, {"type": "text", "text": text})]
        turn = [{"role": "user", "content": parts}]
        return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    logprobs: list[float]
    """Of the ids."""
    prompt: int
    """Tokens of the prompt that the decoder read."""
    kept: list[int] = field(default_factory=list)
    """Which visual tokens of the pictures, one after the other, are among them; an engine does not say."""
    tied: bool = False
    """Whether the last that is kept and the first that is not have the same score, as ends of lines of tiles do, which
    are one embedding: rounding says which of them stays, and that two programs do not share."""


def prompts(count: int, images: int = 1) -> list[Prompt]:
    """Scenes of the demo."""
    pairs = pick_questions("test", count * images)
    groups = [pairs[start : start + images] for start in range(0, count * images, images)]
    return [Prompt([scene.pil() for scene, _ in group], [each.text for _, each in group]) for group in groups]


def optimised(
    folder: Path, asked: Sequence[Asked], tokens: int = TOKENS, allowed: Callable[..., list[int]] | None = None,
    read: str = "logits", **settings: Any,
) -> list[Answer]:  # fmt: skip
    """By `optimize`, one prompt at a time.

    Args:
        allowed: the ids that may come next, asked in every step; None: any.
        read: "logits", or "scores", which know nothing but what is allowed.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    with hawk_compile.pruned(model, backend="eager", **settings):
        for each in asked:
            inputs = each.inputs(processor).to(torch.float32)
            inputs.pop(BOTH_WAYS, None)
            out = model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
                output_scores=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=allowed,
            )  # fmt: skip
            ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            found = [
                torch.log_softmax(row[0].float(), -1)[token].item() for row, token in zip(out[read], ids, strict=True)
            ]
            report = hawk_compile.report(model)
            removed = sum(report.visual_tokens) - sum(report.kept_visual_tokens)
            visual = visual_of(model, inputs["input_ids"]).nonzero().flatten()
            kept = torch.isin(visual, report.keep_indices[0]).nonzero().flatten().tolist()
            tied = report.scores is not None and is_tied(report.scores[0, visual], kept, visual)
            answers.append(Answer(ids, found, inputs["input_ids"].shape[1] - int(removed), kept, tied))
    return answers


def is_tied(scores: Tensor, kept: list[int], visual: Tensor) -> bool:
    """Whether rounding chose among the tokens of a picture.

    Args:
        scores: [V] of visual tokens.
        kept: which of them stay.
        visual: [V], their places in the prompt; those of a picture follow each other.
    """
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[kept] = True
    ends = (visual.diff() != 1).nonzero().flatten() + 1
    for these, stay in zip(scores.tensor_split(ends.tolist()), stays.tensor_split(ends.tolist()), strict=True):
        if stay.any() and not stay.all() and abs(these[stay].min() - these[~stay].max()) < 1e-6:
            return True
    return False


def visual_of(model: Any, ids: Tensor) -> Tensor:
    """[S] bool, of ids [1, S]."""
    config = model.config
    number = getattr(config, "image_token_id", None)
    return ids[0] == (config.image_token_index if number is None else number)


def engine(folder: Path, hawk: dict[str, Any] | None, **options: Any) -> Any:
    """vLLM in this process. One that is not used any more ends first: later, it would end groups of the new one."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    from vllm import LLM

    gc.collect()
    given: dict[str, Any] = {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8,
        "enable_prefix_caching": False, "seed": 0, "distributed_executor_backend": "uni", **options,
    }  # fmt: skip
    return LLM(**given, hf_overrides={"hawk": hawk} if hawk is not None else {})


def requests(folder: Path, asked: Sequence[Asked], ratio: float | None = None) -> list[dict[str, Any]]:
    """As vLLM takes them."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return [
        {
            "prompt": each.rendered(processor), "multi_modal_data": each.data,
            "mm_processor_kwargs": {} if ratio is None else {"hawk_ratio": ratio},
        }
        for each in asked
    ]  # fmt: skip


def sampling(tokens: int = TOKENS, **options: Any) -> Any:
    """vLLM's parameters: greedy unless said otherwise."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "min_tokens": tokens, "logprobs": 1, **options})


def answer(out: Any, sibling: int = 0) -> Answer:
    """Of what vLLM returns for a request."""
    completion = out.outputs[sibling]
    ids = list(completion.token_ids)
    found = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
    return Answer(ids, found, len(out.prompt_token_ids))


def served(
    llm: Any, folder: Path, asked: Sequence[Asked], ratio: float | None = None, tokens: int = TOKENS, **options: Any
) -> list[Answer]:
    """By the engine, all at once."""
    outs = llm.generate(requests(folder, asked, ratio), sampling(tokens), use_tqdm=False, **options)
    return [answer(out) for out in outs]


def apart(
    folder: Path, hawk: dict[str, Any] | None, count: int, tokens: int, options: dict[str, Any], **environment: str
) -> tuple[list[Answer], dict[str, Any]]:
    """Answers to the first `count` of `prompts` by an engine in a process of its own, and what else it says."""
    out = folder.parent / "answers.json"
    given = [folder, json.dumps(hawk), count, tokens, out, json.dumps(options)]
    made = subprocess.run(
        [sys.executable, "-m", "tests.serving.answers", *map(str, given)],
        capture_output=True, text=True, env=os.environ | environment, timeout=240,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    said = json.loads(out.read_text())
    return [Answer(**each) for each in said.pop("answers")], said


def farthest(one: list[Answer], other: list[Answer]) -> float:
    """The largest difference of log-probabilities, where ids and numbers of tokens are the same; else infinite. Of
    answers that are tied only the numbers of tokens count, if not all are."""
    if [each.prompt for each in one] != [each.prompt for each in other]:
        return float("inf")
    clear = [not (x.tied or y.tied) for x, y in zip(one, other, strict=True)]
    if any(clear):
        one, other = list(itertools.compress(one, clear)), list(itertools.compress(other, clear))
    if [each.ids for each in one] != [each.ids for each in other]:
        return float("inf")
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))


def metric(llm: Any, name: str) -> float:
    """A counter of vLLM's."""
    return sum(each.value for each in llm.get_metrics() if each.name == name)
