"""What vLLM's engine does around the plugin, with the plugin: preemption, cancellations, siblings, structured output,
embeddings from the client, speculative decoding, adapters, two ranks. Needs vLLM: `make test-vllm`."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hawk_compile.serving.vllm import checkpoint as read_once
from hawk_compile.serving.vllm.compat import engine as bounds
from tests.serving.engine import (
    Prompt,
    answer,
    apart,
    engine,
    farthest,
    metric,
    optimised,
    prompts,
    requests,
    sampling,
    served,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

CLOSE = 1e-4
LONG = 40
"""Tokens of an answer that needs more blocks than its prompt."""

NARROW: dict[str, Any] = {"block_size": 32, "max_model_len": 128, "max_num_batched_tokens": 24}
"""Few blocks, prefill in chunks."""


def checkpoint(kind: str, folder: Path) -> Path:
    from tests.serving.checkpoints import KINDS

    return KINDS[kind](folder / kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llava", tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Any:
    return engine(
        folder, {"ratio": 0.5}, num_gpu_blocks_override=9, disable_log_stats=False, enable_mm_embeds=True, **NARROW
    )


def test_preempted_requests_go_on_as_if_they_were_not(narrow: Any, folder: Path) -> None:
    asked, before = prompts(8), metric(narrow, "vllm:num_preemptions")
    answers = served(narrow, folder, asked, tokens=LONG)
    assert metric(narrow, "vllm:num_preemptions") > before
    assert farthest(answers, optimised(folder, asked, LONG, ratio=0.5)) < CLOSE


def test_siblings_share_what_was_kept(narrow: Any, folder: Path) -> None:
    """Samples of one prompt, each as likely as `optimize` has it."""
    asked = prompts(2)
    drawn = sampling(n=3, temperature=1)
    outs = narrow.generate(requests(folder, asked), drawn, use_tqdm=False)
    answers = [answer(out, sibling) for out in outs for sibling in range(3)]
    assert len({tuple(each.ids) for each in answers[:3]}) > 1
    said = iter([token for each in answers for token in each.ids])
    expected = optimised(folder, [each for each in asked for _ in range(3)], allowed=lambda *_: [next(said)], ratio=0.5)
    assert farthest(answers, expected) < CLOSE


def test_structured_output(narrow: Any, folder: Path) -> None:
    """Words that are not what the model would have said."""
    from transformers import AutoTokenizer
    from vllm.sampling_params import StructuredOutputsParams

    asked, tokenizer = prompts(3), AutoTokenizer.from_pretrained(folder)
    free = {tokenizer.convert_ids_to_tokens(each.ids[0]) for each in served(narrow, folder, asked, tokens=1)}
    words = [word for word in ("star", "heart", "ring", "cross", "red", "green") if word not in free][:3]
    ids = tokenizer.convert_tokens_to_ids(words)
    chosen = sampling(1, structured_outputs=StructuredOutputsParams(choice=words))
    answers = [answer(out) for out in narrow.generate(requests(folder, asked), chosen, use_tqdm=False)]
    expected = optimised(folder, asked, 1, lambda *_: ids, "scores", ratio=0.5)
    assert farthest(answers, expected) < CLOSE


def test_a_request_that_is_cancelled_in_its_prefill(narrow: Any, folder: Path) -> None:
    asked, inner = prompts(5), narrow.llm_engine
    for number, each in enumerate(requests(folder, asked)):
        inner.add_request(str(number), each, sampling())
    inner.step()
    running = inner.engine_core.engine_core.scheduler.running
    cancelled = running[0].request_id
    assert 0 < running[0].num_computed_tokens < running[0].num_prompt_tokens
    inner.abort_request([cancelled.partition("-")[0]])
    outs = []
    while inner.has_unfinished_requests():
        outs += [out for out in inner.step() if out.finished]
    expected = optimised(folder, asked, ratio=0.5)
    assert sorted(out.request_id for out in outs) == ["1", "2", "3", "4"]
    outs.sort(key=lambda out: out.request_id)
    assert farthest([answer(out) for out in outs], expected[1:]) < CLOSE
    assert farthest(served(narrow, folder, asked), expected) < CLOSE


class Last(Prompt):
    """The image behind its question, at the end of the prompt."""

    def rendered(self, processor: Any) -> str:
        return f"<|im_start|>user\n{self.texts[0]}<image>"


def test_an_image_at_the_end_of_a_prompt(narrow: Any, folder: Path) -> None:
    """What is said stands behind the whole image, in every step."""
    asked = [Last(each.images, each.texts) for each in prompts(3)]
    assert farthest(served(narrow, folder, asked), optimised(folder, asked, ratio=0.5)) < CLOSE


def test_chats_leave_nothing_behind(narrow: Any) -> None:
    """vLLM makes a processor for each: what it needs to know of the checkpoint is known."""
    asked = prompts(1)[0]
    parts = [{"type": "image_pil", "image_pil": asked.images[0]}, {"type": "text", "text": asked.texts[0]}]

    def objects_after(chats: int) -> Counter[type]:
        narrow.chat([[{"role": "user", "content": parts}]] * chats, sampling(1), use_tqdm=False)
        gc.collect()
        return Counter(map(type, gc.get_objects()))

    objects_after(2)
    before, known = objects_after(2), dict(read_once.known)
    more = objects_after(20) - before
    assert not {kind: count for kind, count in more.items() if count >= 20}
    assert known and read_once.known == known


def test_embeddings_of_images_from_the_client_are_pruned_too(narrow: Any, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    asked = prompts(2)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    given = requests(folder, asked)
    for each, prompt in zip(given, asked, strict=True):
        pixels = processor(images=prompt.images, text=each["prompt"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels).pooler_output
        each["multi_modal_data"] = {"image": [features[0]]}
    answers = [answer(out) for out in narrow.generate(given, sampling(), use_tqdm=False)]
    assert farthest(answers, optimised(folder, asked, ratio=0.5)) < CLOSE


RANK, ALPHA = 4, 16


def adapter(folder: Path, base: Path, modules: list[str]) -> Path:
    """A LoRA adapter as peft writes it, of modules of the text decoder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    with safe_open(base / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(f"language_model.model.{name}.weight").get_shape() for name in modules}
    prefix = "base_model.model.language_model.model."
    halves = {}
    for name, (high, wide) in shapes.items():
        halves[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, wide, generator=generator) / wide**0.5
        halves[f"{prefix}{name}.lora_B.weight"] = torch.randn(high, RANK, generator=generator) / RANK**0.5 * 0.5
    save_file(halves, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    """A checkpoint with an adapter in its weights."""
    shutil.copytree(base, folder)
    weights, halves = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, low in halves.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[target] += ALPHA / RANK * halves[name.replace("lora_A", "lora_B")] @ low
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def encoded(llm: Any) -> list[torch.Tensor]:
    """What the engine holds of images: the kept rows, with their positions."""
    return list(llm.llm_engine.model_executor.driver_worker.worker.model_runner.encoder_cache.values())


def test_two_ranks_and_drafts_from_the_prompt(tmp_path: Path) -> None:
    """Heads are shared out: the sum of scores over ranks chooses, once for all of them. Several positions a step.

    In a process of its own: vLLM starts no engine after one that drafts, since it looks through all modules and trips
    over those of numba.
    """
    folder, drafts = checkpoint("qwen2_vl", tmp_path), {"method": "ngram", "num_speculative_tokens": 3}
    options = {
        "tensor_parallel_size": 2, "distributed_executor_backend": "mp",
        "speculative_config": {**drafts, "prompt_lookup_max": 2, "prompt_lookup_min": 1},
    }  # fmt: skip
    cores = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    answers, said = apart(folder, {"ratio": 0.5}, 4, LONG, options, VLLM_CPU_OMP_THREADS_BIND=cores)
    assert said["accepted"] > 0
    assert farthest(answers, optimised(folder, prompts(4), LONG, ratio=0.5)) < CLOSE


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which interprets the runner's kernels, is not here")
def test_the_second_model_runner(tmp_path: Path) -> None:
    """What GPUs run by default; prefill in chunks that cut images, and preemptions."""
    folder = checkpoint("qwen2_vl", tmp_path)
    options = {**NARROW, "num_gpu_blocks_override": 6}
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    answers, said = apart(folder, {"ratio": 0.5}, 4, LONG, options, **environment)
    assert said["runner"] == "vllm.v1.worker.cpu.model_runner" and said["preemptions"] > 0
    assert farthest(answers, optimised(folder, prompts(4), LONG, ratio=0.5)) < CLOSE


@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_compiled(kind: str, tmp_path: Path) -> None:
    folder, asked = checkpoint(kind, tmp_path), prompts(3)
    llm = engine(folder, {"ratio": 0.8}, enforce_eager=False)
    assert farthest(served(llm, folder, asked), optimised(folder, asked, ratio=0.8)) < CLOSE


def test_weights_that_no_model_reads(folder: Path) -> None:
    """Loaders that pass `load_weights` by, as that of random weights does."""
    llm, asked = engine(folder, {"ratio": 0.8}, load_format="dummy"), prompts(1)
    whole, pruned = (served(llm, folder, asked, ratio)[0].prompt for ratio in (0.0, 0.8))
    assert whole - pruned == 64 - 13


def test_a_call_of_the_encoder_sees_no_more_than_was_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 visual tokens may be encoded at once: two images of 64, however few of them are kept."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    calls: list[int] = []
    encode = LlavaForConditionalGeneration.embed_multimodal

    def counting(self: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["pixel_values"]))
        return encode(self, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "embed_multimodal", counting)
    llm, asked = engine(folder, {"ratio": 0.8}, max_num_batched_tokens=128), prompts(10)
    assert farthest(served(llm, folder, asked[:5]), optimised(folder, asked[:5], ratio=0.8)) < CLOSE
    assert calls == [2, 2, 1]
    assert set(map(len, encoded(llm))) == {13}
    monkeypatch.setattr(bounds, "encoder_call", 10**6)
    calls.clear()
    served(llm, folder, asked[5:])
    assert calls == [5], "as many as the scheduler lets in"


def test_adapters(folder: Path, tmp_path: Path) -> None:
    """Base weights score: an adapter of the first layer's queries and keys keeps the tokens that none keeps."""
    from vllm.lora.request import LoRARequest

    first = [f"layers.0.self_attn.{name}_proj" for name in "qk"]
    other = ["layers.1.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj", "layers.0.mlp.up_proj"]
    adapters = [adapter(tmp_path / name, folder, modules) for name, modules in (("first", first), ("other", other))]
    of_first, of_other = [LoRARequest(each.name, number + 1, str(each)) for number, each in enumerate(adapters)]
    asked = prompts(3)
    llm = engine(folder, {"ratio": 0.5}, enable_lora=True, max_loras=2, max_lora_rank=8, disable_log_stats=False)
    expected = optimised(folder, asked, ratio=0.5)
    scored_too, by_other = [
        optimised(merged(tmp_path / f"merged-{each.name}", folder, each), asked, ratio=0.5) for each in adapters
    ]
    assert farthest(by_other, expected) > 1e-2

    by_first = served(llm, folder, asked, lora_request=of_first)
    kept = encoded(llm)
    assert farthest(by_first, expected) > 1e-2 and farthest(by_first, scored_too) > 1e-2
    llm.llm_engine.reset_encoder_cache()
    assert farthest(served(llm, folder, asked), expected) < CLOSE
    assert len(kept) == 3 and all(map(torch.equal, kept, encoded(llm)))
    assert farthest(served(llm, folder, asked, lora_request=of_other), by_other) < CLOSE
    mixed = llm.generate(
        requests(folder, asked), sampling(), use_tqdm=False, lora_request=[of_other, of_first, of_other]
    )
    assert farthest([answer(out) for out in mixed], [by_other[0], by_first[1], by_other[2]]) < CLOSE
