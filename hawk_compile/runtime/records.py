"""What a prefill did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hawk_compile.capture.image_cache import ImageCacheUse
from hawk_compile.plan.question import Question


@dataclass(frozen=True)
class Report:
    """One prefill. Positions count within each padded row.

    Attributes:
        visual_tokens: [B] int64, visual tokens of each row.
        kept_visual_tokens: [B] int64, those of them that were kept.
        keep_indices: per row an int64 tensor, ascending: the positions that were kept, text included.
        scores: [B, S] float32, the HAWK score of each visual token, 0 elsewhere; None where nothing was scored.
        reason: why tokens were or were not removed.
        query_source: per row, where the text that voted stands: 'after_image' (in the newest user's turn, behind its
            last image if it has any), 'turn' (in that turn, but before its last image), 'earlier_turn' (the newest turn
            holds no text), 'any_text' (no user's turn does) or 'given' (by the call). With `question="own"`, of the
            row's last image and its own turn.
        question_rule: per row, how it was found: by the 'template', from the 'ids' alone, or 'given'.
        chat_template: which chat template that was, or why there is none.
        head_weights: where the head weights came from.
        prompt_tokens: S, the prompt's full length.
        kept_tokens: S', the length the decoder ran at, from the layer that scores on.
        scoring_layer: the decoder layer whose queries and keys scored, counted from 0: the first with attention that
            has keys. Layers before it, which keep states, ran at S.
        prefill_attention: the attention implementation that this prefill ran with: "sdpa" where tokens could be pruned,
            "eager" for a decoder that has no SDPA, or a function's own name that others than transformers registered.
        attention: the one that the model uses elsewhere, in decode steps and prompts without images.
        image_cache: what came of `image_cache` up to this prefill; None where nothing is kept.
    """

    visual_tokens: Tensor
    kept_visual_tokens: Tensor
    keep_indices: list[Tensor]
    scores: Tensor | None
    reason: str
    query_source: list[str]
    head_weights: str
    prompt_tokens: int
    kept_tokens: int
    question_rule: list[str]
    chat_template: str
    scoring_layer: int
    prefill_attention: str
    attention: str
    image_cache: ImageCacheUse | None = None


@dataclass(frozen=True)
class PrefillRecord:
    """What a prefill leaves behind; tensors stay on their device until a report is asked for.

    `rule` is what says how much is removed; where nothing was selected (`keep` is None), why. `text_tokens` are those
    of each row that are neither visual nor padding. `awaited` says, of a prompt without features, which modalities'
    placeholders stand in it.
    """

    visual_tokens: list[int]
    text_tokens: list[int]
    keep: Tensor | None
    valid: Tensor | None
    scores: Tensor | None
    rule: str
    question: Question | None
    head_weights: str
    prompt_tokens: int
    chat_template: str = ""
    scoring_layer: int = 0
    prefill_attention: str = ""
    attention: str = ""
    image_cache: ImageCacheUse | None = None
    awaited: Mapping[str, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrefillRecord":
        return self  # nothing in it changes: copies of a cache share it

    def report(self) -> Report:
        if self.keep is None or self.valid is None:
            indices = [torch.arange(self.prompt_tokens, device="cpu") for _ in self.visual_tokens]
        else:
            pairs = zip(self.keep.cpu(), self.valid.cpu(), strict=True)
            indices = [keep[valid] for keep, valid in pairs]
        total, kept = sum(self.visual_tokens), self.visual_tokens
        reason = self.rule
        if awaited := " and ".join(modality for modality, found in self.awaited.items() if found):
            reason = f"the prompt holds placeholders of {awaited} tokens, but no {awaited} was given with it"
        if self.keep is not None:
            kept = [len(each) - text for each, text in zip(indices, self.text_tokens, strict=True)]
            removed = total - sum(kept)
            reason += f" removes {removed} of" if removed else " leaves all"
            reason += f" {total} visual tokens"
        question = self.question
        return Report(
            visual_tokens=torch.tensor(self.visual_tokens, dtype=torch.int64, device="cpu"),
            kept_visual_tokens=torch.tensor(kept, dtype=torch.int64, device="cpu"),
            keep_indices=indices,
            scores=None if self.scores is None else self.scores.cpu(),
            reason=reason,
            query_source=[] if question is None else [source.name.lower() for source in question.source],
            question_rule=[] if question is None else [rule.name.lower() for rule in question.rule],
            chat_template=self.chat_template,
            scoring_layer=self.scoring_layer,
            prefill_attention=self.prefill_attention,
            attention=self.attention,
            image_cache=self.image_cache,
            head_weights=self.head_weights,
            prompt_tokens=self.prompt_tokens,
            kept_tokens=self.prompt_tokens if self.keep is None else self.keep.shape[1],
        )
