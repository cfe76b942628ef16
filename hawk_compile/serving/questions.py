"""Whose text votes on an item, found in a prompt that holds one placeholder for each item.

A server knows items before they are encoded, so a prompt is looked at as the client sent it: an item is the ids that
will become its visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.question import counted, find_question

Span = tuple[int, int]
"""(start, stop) of the ids that stand for an item."""


@dataclass(frozen=True)
class Reader:
    """What is known of a checkpoint's chats.

    Attributes:
        ids: that say where a question stands.
        chat: what the chat template puts around a user's text; None: the ids alone say it.
        own: whether each item is scored by the text of its own turn, else all by the newest user's.
        query: as `HawkConfig.used_query`.
    """

    ids: SpecialIds
    chat: ChatFormat | None
    own: bool
    query: str

    def questions(self, prompt: Sequence[int], items: Sequence[Span]) -> list[tuple[int, ...]]:
        """The ids that vote on each item; none where there is no text."""
        if not items:
            return []
        ids = torch.tensor([list(prompt)], dtype=torch.int64)
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for start, stop in items:
            visual[0, start:stop] = True
        found = find_question(ids, visual, torch.ones_like(visual), self.ids, self.chat, self.own)
        masks = found.mask if found.mask.dim() == 3 else found.mask.unsqueeze(1)  # [1, G, S]
        votes = [ids[0, mask & ~visual[0]].tolist() for mask in counted(masks, self.query)[0]]
        if found.images is None:
            return [tuple(votes[0])] * len(items)
        group = found.images[0].int().argmax(0).tolist()  # of every position, which question scores it
        return [tuple(votes[group[start]]) for start, _ in items]
