"""The plan of one prefill, made on the host before the graph runs: the question, and how much each row keeps.

The device is asked once, for the ids and the padding; with them every size of the pruned prefill is known beforehand.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import InputError
from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.given import given_question
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.question import Question, counted, each_image_apart, find_question
from hawk_compile.plan.quotas import Quotas
from hawk_compile.settings.config import HawkConfig


@dataclass(frozen=True)
class Plan:
    """What a prefill of B rows and S positions will do.

    Attributes:
        question_mask: [B, S] bool, text tokens whose queries are averaged; [B, G, S] in G groups of images.
        question_images: [B, G, S] bool, the visual tokens that each question scores; None where there is one a row.
        question: where it stands, and how it was found.
        budget: [B] int64, visual tokens each row keeps, or the most of them if there is a `least`.
        least: [B] int64, the least of them, where the graph finds the number itself.
        quotas: what every image keeps, if the settings say anything of that.
        visual: visual tokens of each row.
        text: other real tokens of each row.
        kept: as `budget`, on the host.
        length: S', the positions every row keeps, or the most of them.
        padded: whether some row holds padding before pruning.
        filled: whether some row holds padding or filling after pruning.
        candidates: [B, S] bool, the visual tokens that may be removed; None if all may.
    """

    question_mask: Tensor
    question_images: Tensor | None
    question: Question
    budget: Tensor
    least: Tensor | None
    quotas: Quotas | None
    visual: list[int]
    text: list[int]
    kept: list[int]
    length: int
    padded: bool
    filled: bool
    candidates: Tensor | None

    @property
    def visual_slots(self) -> int:
        """V', the visual tokens kept over all rows; 1 where all are masked out, for an index that nothing reads, since
        an empty tensor cannot be indexed."""
        return max(sum(self.kept), 1)

    def to(self, device: torch.device) -> "Plan":
        """The plan with its tensors on a device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        quotas = None if self.quotas is None else replace(
            self.quotas, image=self.quotas.image.to(device), floor=self.quotas.floor.to(device)
        )  # fmt: skip
        return replace(self, **moved, quotas=quotas)


def on_host(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, what is not padding), both [B, S] on the host: the one time that a plan reads from the device."""
    if attention_mask is None:
        return input_ids.cpu(), torch.ones_like(input_ids, dtype=torch.bool, device="cpu")
    if input_ids.device.type == "cpu":
        return input_ids, attention_mask != 0
    ids, mask = torch.stack([input_ids, (attention_mask != 0).to(input_ids.dtype)]).cpu()
    return ids, mask != 0


def make_plan(
    input_ids: Tensor,
    visual: Tensor,
    attention_mask: Tensor | None,
    features: int,
    ids: SpecialIds,
    config: HawkConfig,
    prompt: int | None = None,
    images: Quotas | None = None,
    candidates: Tensor | None = None,
    chat: ChatFormat | None = None,
    question_mask: Tensor | None = None,
) -> Plan:
    """Plan a prefill. All tensors are on the host.

    Args:
        input_ids: [B, S] int64; -1 where a prompt of embeddings holds an unknown token.
        visual: [B, S] bool, the placeholders of visual features.
        attention_mask: [B, S], nonzero for real tokens; None if all are.
        features: number of visual features that were encoded.
        prompt: positions from here on do not vote; None if all may.
        images: what every image keeps at least.
        candidates: [B, S] bool, those of `visual` that may be removed; None if all may.
        chat: what the chat template puts around a user's text; None: the ids alone say who votes.
        question_mask: [B, S], nonzero for the question's tokens, where the call gives them.

    Raises:
        InputError: features and placeholders differ in number, or a row has visual tokens and no text to score them.
    """
    real = torch.ones_like(visual) if attention_mask is None else attention_mask != 0
    asked = real if prompt is None else real & (torch.arange(real.shape[1], device="cpu") < prompt)
    if question_mask is not None:
        question = given_question(input_ids, visual, asked, question_mask)
    else:
        question = find_question(input_ids, visual, asked, ids, chat, config.question == "own")
    check_placeholders(visual, features, images)
    if config.normalize_per == "image" and images is not None:
        question = each_image_apart(question, images.image)
    removable = visual if candidates is None else candidates
    tokens, present = (removable & real).sum(1).tolist(), real.sum(1).tolist()
    guaranteed = [0] * len(tokens) if images is None else images.total.tolist()
    text = [total - count for total, count in zip(present, tokens, strict=True)]
    bounds = [config.bounds(*row) for row in zip(tokens, guaranteed, text, strict=True)]
    fewest, kept = [low for low, _ in bounds], [high for _, high in bounds]
    check_question(question, tokens, fewest)
    needed = [others + keep for others, keep in zip(text, kept, strict=True)]
    length = visual.shape[1] if kept == tokens else max(needed)
    return Plan(
        question_mask=counted(question.mask, config.used_query),
        question_images=question.images,
        question=question,
        budget=torch.tensor(kept, device="cpu"),
        least=None if config.budget is None else torch.tensor(fewest, device="cpu"),
        quotas=images,
        visual=tokens,
        text=text,
        kept=kept,
        length=length,
        padded=any(total != visual.shape[1] for total in present),
        filled=any(total != length for total in needed) or (config.budget is not None and len(needed) > 1),
        candidates=candidates,
    )


def check_placeholders(visual: Tensor, features: int, images: Quotas | None) -> None:
    """Refuse prompts whose placeholders are not those of the features."""
    placeholders = int(visual.sum())
    if placeholders != features:
        raise InputError(
            f"the prompt has {placeholders} placeholders for visual tokens, but {features} visual features were "
            "encoded: give the images, videos and audio that belong to exactly these placeholders"
        )
    if images is not None and (known := int((images.image >= 0).sum())) != images.tokens:
        raise InputError(
            "min_per_image, quota and normalize_per find the tokens of images by placeholder ids of their own; for "
            f"{images.tokens} tokens the prompt has {known} such ids: leave these settings out for prompts like this"
        )


def check_question(question: Question, tokens: list[int], fewest: list[int]) -> None:
    """Refuse rows that would lose visual tokens without any text to score them."""
    questions = question.mask.flatten(1).any(1).tolist()
    for row, (count, low, asked) in enumerate(zip(tokens, fewest, questions, strict=True)):
        if low < count and not asked:
            raise InputError(
                f"row {row} of the prompt has {count} visual tokens and no text token that could score them: add a "
                "question, or call the model with ratio=0"
            )
