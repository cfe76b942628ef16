"""Accuracy of the demo model with visual tokens removed: by the pass, and by hand for choices the pass does not make.

By the pass: `hawk_compile.optimize`, one question a call. By hand: the decoder run on embeddings and positions gathered
in plain PyTorch. Without removal both must give the same answers; `run` checks that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hawk_compile
from hawk_compile.errors import InputError
from hawk_compile.tools.demo.scenes import Question, Scene, token_cover


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question about one scene, encoded.

    Attributes:
        input_ids: [1, S] int64.
        positions: [4, 1, S] int64: the text positions, then the three of mRoPE, as `generate` makes them.
        features: [V, D], the picture as the vision tower sees it; questions about one scene share it.
        first: where the V visual tokens start.
        answer: the right answer's token id.
        chance: [V], uniform noise: the score of the random choice.
    """

    scene: Scene
    question: Question
    input_ids: Tensor
    positions: Tensor
    features: Tensor
    first: int
    answer: int
    chance: Tensor

    @property
    def visual(self) -> int:
        return self.features.shape[0]


Score = Callable[[Prompt], Tensor]
"""[V] scores of one question's visual tokens; those with the highest are kept."""


def chat(processor: Any, question: str) -> str:
    """The chat template around one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def prepare(model: Any, processor: Any, pairs: list[tuple[Scene, Question]], seed: int = 0) -> list[Prompt]:
    """Encode questions; a scene's questions must stand side by side, and its picture is encoded once."""
    prompts: list[Prompt] = []
    generator = torch.Generator().manual_seed(seed)
    base, pad = model.base_model, processor.image_token
    for scene, questions in by_scene(pairs):
        picture = processor.image_processor(images=[scene.pil()], return_tensors="pt")
        grid = picture["image_grid_thw"]
        features = torch.cat(list(base.get_image_features(picture["pixel_values"], grid).pooler_output))
        for question in questions:
            text = chat(processor, question.text).replace(pad, pad * len(features))
            ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
            is_visual = ids == model.config.image_token_id
            rope, _ = base.get_rope_index(ids, is_visual.int(), grid)
            positions = torch.cat([torch.arange(ids.shape[1]).expand(1, 1, -1), rope])
            answer = processor.tokenizer.convert_tokens_to_ids(question.answer)
            chance = torch.rand(len(features), generator=generator)
            first = int(is_visual.int().argmax())
            prompts.append(Prompt(scene, question, ids, positions, features, first, answer, chance))
    return prompts


def by_scene(pairs: list[tuple[Scene, Question]]) -> Iterator[tuple[Scene, list[Question]]]:
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or pairs[stop][0] is not pairs[start][0]:
            yield pairs[start][0], [question for _, question in pairs[start:stop]]
            start = stop


def inputs_of(prompt: Prompt) -> dict[str, Any]:
    """The arguments of a forward whose picture is encoded already."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    picture = BaseModelOutputWithPooling(pooler_output=[prompt.features])  # type: ignore[arg-type]
    return {
        "input_ids": prompt.input_ids,
        "position_ids": prompt.positions,
        "mm_encoder_outputs": {"image": picture},
        "logits_to_keep": 1,
    }


@torch.no_grad()
def by_pass(model: Any, prompts: list[Prompt], **settings: Any) -> tuple[np.ndarray, list[Tensor]]:
    """Answers of the optimised model: token ids [N], and each question's scores [V]. The model stays optimised.

    Args:
        **settings: of `hawk_compile.HawkConfig`; `ratio` is the fraction of visual tokens removed.
    """
    hawk_compile.optimize(model, **settings)
    answers, scores = [], []
    for prompt in prompts:
        answers.append(int(model(**inputs_of(prompt)).logits[0, -1].argmax()))
        found = hawk_compile.report(model).scores
        assert found is not None
        scores.append(found[0, prompt.first : prompt.first + prompt.visual])
    return np.array(answers), scores


@torch.no_grad()
def by_hand(model: Any, prompts: list[Prompt], ratio: float, score: Score) -> np.ndarray:
    """Answers [N] of the plain model when only the best-scored visual tokens are left in its input.

    Args:
        ratio: fraction of visual tokens removed; as many are kept as `hawk_compile` keeps.
    """
    hawk_compile.restore(model)
    kept = hawk_compile.HawkConfig(ratio=ratio).kept
    answers = []
    for prompt in prompts:
        start, stop = prompt.first, prompt.first + prompt.visual
        embeds = model.get_input_embeddings()(prompt.input_ids)
        embeds[0, start:stop] = prompt.features.to(embeds.dtype)
        best = score(prompt).topk(kept(prompt.visual)).indices.sort().values + start
        keep = torch.cat([torch.arange(start), best, torch.arange(stop, embeds.shape[1])])
        # Without the text row: transformers would take a gap in it for the start of another packed sequence.
        positions = prompt.positions[1:, :, keep]
        hidden = model.base_model.language_model(
            inputs_embeds=embeds[:, keep], position_ids=positions, use_cache=False
        ).last_hidden_state
        answers.append(int(model.lm_head(hidden[0, -1]).argmax()))
    return np.array(answers)


def random_choice(prompt: Prompt) -> Tensor:
    return prompt.chance


def oracle(prompt: Prompt) -> Tensor:
    """The asked-for object's own tokens first, then random ones: the best that a choice by question could do."""
    cover = token_cover(prompt.scene.objects[prompt.question.target].box, prompt.scene.size)
    return torch.from_numpy(cover).float() + 1e-3 * prompt.chance


def another_question(prompts: list[Prompt], scores: list[Tensor]) -> Score:
    """The scores of the next question about the same scene: how much of a score the question makes.

    Raises:
        InputError: a scene has one question only.
    """
    borrowed: dict[int, Tensor] = {}
    for scene in {id(prompt.scene): prompt.scene for prompt in prompts}.values():
        places = [place for place, prompt in enumerate(prompts) if prompt.scene is scene]
        if len(places) == 1:
            raise InputError(f"scene {scene.index} has one question, and no other to borrow scores from: give more")
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            borrowed[id(prompts[place])] = scores[other]
    return lambda prompt: borrowed[id(prompt)]


def diverse(prompts: list[Prompt]) -> Score:
    """DivPrune's choice (arXiv 2503.02175), which looks at the picture alone: made once for each scene."""
    made = {id(prompt.features): prompt.features for prompt in prompts}
    ranked = {key: farthest_first(features) for key, features in made.items()}
    return lambda prompt: ranked[id(prompt.features)]


def farthest_first(features: Tensor) -> Tensor:
    """[V] scores of features [V, D]: each token taken is the farthest (cosine) from all taken before it.

    The first is the one whose nearest neighbour is farthest. Scores fall in the order of taking, so the best n of them
    are the choice of n tokens, for every n.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    left = distance.clone().fill_diagonal_(math.inf).min(0).values
    scores = torch.empty(len(unit))
    for rank in range(len(unit)):
        taken = int(left.argmax())
        scores[taken] = -rank
        left = distance[taken].clone() if rank == 0 else torch.minimum(left, distance[taken])
        left[taken] = -math.inf
    return scores
