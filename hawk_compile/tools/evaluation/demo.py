"""The demo's own questions, and control rows that only they allow: which tokens an answer needs is known there.

    oracle             the asked-for object's tokens are kept, then random ones: what a choice by question can reach
    another question   HAWK's scores for the next question about the same scene: how much of them the question makes

Both choices are made outside of the graph: the shipped model's decoder runs on inputs gathered by hand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawk_compile.errors import InputError
from hawk_compile.runtime.api import restore
from hawk_compile.tools.demo.evaluate import another_question, by_hand, by_pass, oracle, prepare
from hawk_compile.tools.demo.scenes import COLORS, DIGITS, SPLITS, Question, Scene, pick_questions
from hawk_compile.tools.evaluation.result import Evaluation
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.evaluation.scored import Row

DEMO = "demo"
"""Names the demo's own questions; "demo:tune" those of another split."""
MODEL = Path(__file__).parents[1] / "demo" / "model"
"""The shipped checkpoint."""
QUESTIONS, PER_SCENE = 2000, 4
ANOTHER, ORACLE = "hawk, another question's scores", "oracle"


@dataclass(frozen=True)
class DemoSample(Sample):
    """A question about a scene whose objects are known."""

    scene: Scene | None = None
    asked: Question | None = None


def demo_samples(name: str, limit: int | None = None) -> list[Sample]:
    """Questions of a split ("demo" is the test split, "demo:tune" another), four about each scene.

    Raises:
        InputError: no such split.
    """
    split = name.partition(":")[2] or "test"
    if split not in SPLITS:
        raise InputError(
            f'data must be "{DEMO}" or "{DEMO}:SPLIT" with a split of {", ".join(SPLITS)}, got {name!r}: give '
            "one of these"
        )
    pairs = pick_questions(split, QUESTIONS if limit is None else limit, PER_SCENE)
    pictures = {id(scene): scene.pil() for scene, _ in pairs}
    return [
        DemoSample(
            images=(pictures[id(scene)],), question=question.text, answers=(question.answer,),
            kind=kind_of(question.answer), origin=f"{split} scene {scene.index}", scene=scene, asked=question,
        )
        for scene, question in pairs
    ]  # fmt: skip


def kind_of(answer: str) -> str:
    return "color" if answer in COLORS else "digit" if answer in DIGITS else "shape"


def control_rows(model: Any, processor: Any, found: Evaluation) -> list[Row]:
    """The two control rows at every ratio of an evaluation of the demo's questions. The model is left unpruned.

    Args:
        model, processor: the shipped ones, on the CPU.
    """
    pairs = [(each.scene, each.asked) for each in found.samples if isinstance(each, DemoSample)]
    prompts = prepare(model, processor, pairs)  # type: ignore[arg-type]
    ratios = list(dict.fromkeys(row.ratio for row in found.rows))
    _, scores = by_pass(model, prompts, ratio=ratios[0], backend="eager")
    choices = {ANOTHER: another_question(prompts, scores), ORACLE: oracle}
    answers = np.array([prompt.answer for prompt in prompts])
    rows = [
        Row(label, ratio, (by_hand(model, prompts, ratio, choice) == answers).astype(np.float64))
        for label, choice in choices.items()
        for ratio in ratios
    ]
    restore(model)
    return rows
