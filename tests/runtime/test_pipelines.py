"""Other doors of transformers to an optimised model: pipelines, and batches that go on as requests come."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

import hawk_compile
from hawk_compile.tools.demo.scenes import make_scene
from tests import zoo
from tests.exporting import demo
from tests.runtime.reference import Conversation, best, decoder_inputs, scores

RATIO, TOKENS = 0.7, 4


def by_hand(model: Any, chat: list[Any]) -> str:
    """The answer of a plain model run on what it keeps of a prompt: the question's words vote."""
    processor, config = demo.processor(), model.config
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    merged, ids = decoder_inputs(model, inputs), inputs["input_ids"][0].tolist()
    visual = [place for place, each in enumerate(ids) if each == config.image_token_id]
    ends = processor.tokenizer.eos_token_id
    votes = range(ids.index(config.vision_end_token_id) + 1, ids.index(ends, visual[-1]))
    with torch.no_grad():
        kept = best(scores(model.base_model.get_decoder(), merged["inputs_embeds"][0], visual, [*votes]), RATIO)
    keep = sorted({*range(len(ids))} - {*visual} | {visual[rank] for rank in kept})
    assert len(keep) < len(ids)
    loop = Conversation(model, RATIO)
    loop.gathered(merged, ids, inputs, torch.tensor(keep))
    tokens = loop.greedy(TOKENS)
    tokens = tokens[: tokens.index(ends)] if ends in tokens else tokens
    return processor.decode(tokens, skip_special_tokens=True).strip()


def test_a_pipeline_answers_as_the_plain_model_on_kept_tokens() -> None:
    model = hawk_compile.optimize(demo.cut(), ratio=RATIO, backend="eager", head_weights="uniform")
    answer = pipeline("image-text-to-text", model=model, processor=demo.processor())
    scenes = [make_scene("test", seed, (336, 336)) for seed in (1, 2)]
    chats = [
        [{"role": "user", "content": [
            {"type": "image", "image": scene.pil()}, {"type": "text", "text": scene.questions[0].text},
        ]}]
        for scene in scenes
    ]  # fmt: skip
    for chat in chats:
        said = answer(text=chat, max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
        assert said[0]["generated_text"].strip() == by_hand(demo.cut(), chat)
        report = hawk_compile.report(model)
        assert report.kept_visual_tokens < report.visual_tokens


def test_a_continuous_batch_answers_as_the_plain_model() -> None:
    """It takes ids alone, and so text alone."""
    model, prompts = zoo.build("llava", layers=2), [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)

    def answers() -> list[list[int]]:
        said = model.generate_batch(prompts, settings, continuous_batching_config=small, progress_bar=False)
        return [said[each].generated_tokens for each in sorted(said)]

    plain = answers()
    hawk_compile.optimize(model, ratio=RATIO, backend="eager")
    assert answers() == plain and [len(each) for each in plain] == [TOKENS] * 2
