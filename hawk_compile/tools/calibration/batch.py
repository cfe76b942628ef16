"""One batch of questions, encoded once, and its scores with all heads and without each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.features import FEATURES, LAYER_FEATURES
from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.capture.modalities import modalities_of, visual_places
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.calibration.ablation import SCORE, ablated
from hawk_compile.tools.calibration.likelihood import likelihoods
from hawk_compile.tools.evaluation.asking import answer_scores, encoded
from hawk_compile.tools.evaluation.metrics import Metric
from hawk_compile.tools.evaluation.sample import Sample
from hawk_compile.tools.switching import Switch


@dataclass
class Batch:
    """Questions that are scored together.

    Attributes:
        config: the settings that "score" prunes by, but for the ratio and the head weights.
        metric: None is the likelihood.
        heads_at_once: heads that one forward leaves out, each in rows of its own.
        switch: what `left_as_it_was` yields.
        skip_bad: a score that is none becomes NaN.
        images: encoded pictures that are kept from batch to batch; None where none are.
    """

    model: PreTrainedModel
    processor: Any
    samples: list[Sample]
    ablation: str
    config: HawkConfig
    ratios: Sequence[float]
    metric: Metric | None
    max_new_tokens: int
    heads_at_once: int
    switch: Switch
    skip_bad: bool
    images: ImageCache | None = None

    def __post_init__(self) -> None:
        self.inputs = encoded(self.model, self.processor, self.samples, self.images)
        self.heads = heads_of(self.model)
        present = modalities_of(self.model, self.inputs)
        self.visual = visual_places(self.model, self.inputs["input_ids"], present)

    def scores(self) -> list[list[float]]:
        """[1 + H][samples]: with all heads, then without each."""
        heads, at_once = range(self.heads), self.heads_at_once
        if self.ablation == SCORE:
            return [self.pruned(head) for head in (None, *heads)]
        groups = [[], *(heads[start : start + at_once] for start in range(0, self.heads, at_once))]
        return [row for group in groups for row in self.unpruned(group)]

    def pruned(self, head: int | None) -> list[float]:
        """Under pruning by all heads but one, mean over the ratios."""
        weights = tuple(float(each != head) for each in range(self.heads))
        found = []
        for ratio in self.ratios:
            self.switch(replace(self.config, ratio=ratio, head_weights=weights))
            found.append(self.measured(self.inputs, self.samples))
        return np.mean(found, axis=0).tolist()

    def unpruned(self, heads: Sequence[int]) -> list[list[float]]:
        """[heads][samples], without each; [1][samples] with all of them where none is given."""
        self.switch(None)
        copies = max(1, len(heads))
        inputs = repeated(self.inputs, copies)
        visual = self.visual.repeat(copies, 1)
        with ablated(self.model, self.ablation, [head for head in heads for _ in self.samples], visual):
            found = self.measured(inputs, self.samples * copies)
        return np.reshape(found, (copies, -1)).tolist()

    def measured(self, inputs: dict[str, Any], samples: Sequence[Sample]) -> list[float]:
        if self.metric is None:
            return likelihoods(self.model, self.processor, inputs, samples)
        return answer_scores(
            self.model, self.processor, inputs, samples, self.metric, self.max_new_tokens, self.skip_bad
        )


def repeated(inputs: dict[str, Any], copies: int) -> dict[str, Any]:
    """An encoded batch [B, S] so many times below itself, [copies * B, S]."""

    def more(given: Any, dim: int = 0) -> Any:
        return torch.cat([given] * copies, dim) if isinstance(given, Tensor) else [*given] * copies

    features = {}
    for modality, output in inputs["mm_encoder_outputs"].items():
        if not output:
            continue
        parts = {FEATURES: more(output[FEATURES])}
        if output.get(LAYER_FEATURES) is not None:
            parts[LAYER_FEATURES] = [more(level) for level in output[LAYER_FEATURES]]
        features[modality] = type(output)(**parts)
    rows = {name: more(value, value.ndim - 2) for name, value in inputs.items() if isinstance(value, Tensor)}
    return {**inputs, **rows, "mm_encoder_outputs": features}


def heads_of(model: PreTrainedModel) -> int:
    """Query heads of a layer."""
    return int(model.config.get_text_config().num_attention_heads)
