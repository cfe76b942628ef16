"""The plan of one prefill, made on the host before the graph runs: who votes, and how much each row keeps.

The device is asked once, for a few counts per row; with them every size of the pruned prefill is known beforehand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hawk_compile.errors import InputError
from hawk_compile.plan.question import SpecialIds, counted, voting_text
from hawk_compile.settings.budgets import Quotas
from hawk_compile.settings.config import HawkConfig


@dataclass(frozen=True)
class Plan:
    """What a prefill of B rows and S positions will do.

    Attributes:
        votes: [B, S] bool, text tokens whose queries are averaged.
        source: [B] int64, a `QuerySource` per row.
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

    votes: Tensor
    source: Tensor
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
) -> Plan:
    """Plan a prefill.

    Args:
        input_ids: [B, S] int64; -1 where a prompt of embeddings holds an unknown token.
        visual: [B, S] bool, the placeholders of visual features.
        attention_mask: [B, S], nonzero for real tokens; None if all are.
        features: number of visual features that were encoded.
        prompt: positions from here on do not vote; None if all may.
        images: what every image keeps at least.
        candidates: [B, S] bool, those of `visual` that may be removed; None if all may.

    Raises:
        InputError: features and placeholders differ in number, or a row has visual tokens and no text to score them.
    """
    real = torch.ones_like(visual) if attention_mask is None else attention_mask != 0
    asked = real if prompt is None else real & (torch.arange(real.shape[1], device=real.device) < prompt)
    votes, source = voting_text(input_ids, visual, asked, ids)
    votes = counted(votes, config.used_query)
    removable = visual if candidates is None else candidates
    floors = torch.zeros_like(source) if images is None else images.total
    known = torch.zeros_like(source) if images is None else (images.image >= 0).sum(1)
    stacked = [visual.sum(1), (removable & real).sum(1), real.sum(1), votes.sum(1), floors, known]
    placeholders, tokens, present, voters, guaranteed, in_images = torch.stack(stacked).tolist()
    if sum(placeholders) != features:
        raise InputError(
            f"the prompt has {sum(placeholders)} placeholders for visual tokens, but {features} visual features were "
            "encoded: give the images, videos and audio that belong to exactly these placeholders"
        )
    if images is not None and sum(in_images) != images.tokens:
        raise InputError(
            f"min_per_image and quota find the tokens of images by placeholder ids of their own; for {images.tokens} "
            f"tokens the prompt has {sum(in_images)} such ids: leave both settings out for prompts like this"
        )
    bounds = [config.bounds(count, floor) for count, floor in zip(tokens, guaranteed, strict=True)]
    fewest, kept = [low for low, _ in bounds], [high for _, high in bounds]
    for row, (count, low, voting) in enumerate(zip(tokens, fewest, voters, strict=True)):
        if low < count and not voting:
            raise InputError(
                f"row {row} of the prompt has {count} visual tokens and no text token that could score them: add a "
                "question, or call the model with ratio=0"
            )
    needed = [total - count + keep for total, count, keep in zip(present, tokens, kept, strict=True)]
    length = visual.shape[1] if kept == tokens else max(needed)
    return Plan(
        votes=votes,
        source=source,
        budget=torch.tensor(kept, device=visual.device),
        least=None if config.budget is None else torch.tensor(fewest, device=visual.device),
        quotas=images,
        visual=tokens,
        text=[total - count for total, count in zip(present, tokens, strict=True)],
        kept=kept,
        length=length,
        padded=any(total != visual.shape[1] for total in present),
        filled=any(total != length for total in needed) or (config.budget is not None and len(needed) > 1),
        candidates=candidates,
    )
