"""The question: which text tokens vote on the visual ones (HAWK, arXiv 2604.07812).

The newest user's text votes, in every chat format, and nothing else. Where users' texts stand is known from the chat
template (`template.py`, `chat.py`), else from the ids alone (`turns.py`). Of the turn, what stands behind its last
image votes, as in the reference implementation; where nothing does, all of the turn; where it holds no text, an earlier
user's (`row.py`). With `question="own"` every image is scored by the text of its own turn. A question that a call gives
itself goes before all (`given.py`).

All of it runs on the host, on ids that were copied there once.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.row import QuerySource, QuestionRule, RowTurns


@dataclass(frozen=True)
class Question:
    """What votes in B rows of S positions, on the host.

    Attributes:
        mask: [B, S] bool, the text that votes; [B, G, S] where images have questions of their own.
        images: [B, G, S] bool, the visual tokens that each of these G questions scores; None where there is one.
        source: a `QuerySource` per row.
        rule: a `QuestionRule` per row.
    """

    mask: Tensor
    images: Tensor | None
    source: list[QuerySource]
    rule: list[QuestionRule]


def find_question(
    input_ids: Tensor, visual: Tensor, real: Tensor, ids: SpecialIds, chat: ChatFormat | None = None, own: bool = False
) -> Question:
    """Which tokens vote.

    Args:
        input_ids: [B, S] int64 on the host; -1 where an id is not known.
        visual: [B, S] bool.
        real: [B, S] bool: what is not padding.
        chat: what the chat template puts around a user's text; None: the ids alone say it.
        own: every image has a question of its own, the text of its turn.
    """
    rows = [
        RowTurns(row, seen & there, there, ids, chat)
        for row, seen, there in zip(input_ids.numpy(), visual.numpy(), real.numpy(), strict=True)
    ]
    rule = [row.rule for row in rows]
    groups = [row.own() if own else [(*row.newest(), None)] for row in rows]
    source = [group[-1][1] for group in groups]
    most = max(map(len, groups), default=1)
    mask = np.zeros((len(rows), most, input_ids.shape[1]), bool)
    images = np.zeros_like(mask)
    for row, group in enumerate(groups):
        for place, (text, _, seen) in enumerate(group):
            mask[row, place] = text
            if seen is not None:
                images[row, place] = seen
    if most == 1:
        return Question(torch.from_numpy(mask[:, 0]), None, source, rule)
    return Question(torch.from_numpy(mask), torch.from_numpy(images), source, rule)


def each_image_apart(question: Question, image: Tensor) -> Question:
    """The same question, asked of every image by itself: scores are then normalised over one image's tokens.

    Args:
        image: [B, S] int64, which image a position belongs to, counted over the batch; -1 elsewhere.
    """
    texts, seen_by = question.mask.numpy(), None if question.images is None else question.images.numpy()
    rows = []
    for row, places in enumerate(image.numpy()):
        groups = []
        for number in np.unique(places[places >= 0]):
            seen = places == number
            text = texts[row] if seen_by is None else texts[row, seen_by[row, :, seen.argmax()].argmax()]
            groups.append((text, seen))
        rows.append(groups)
    most = max(map(len, rows), default=1)
    if most < 2:
        if seen_by is None:
            return question
        # Of several questions the one that scores the image: others may stand with videos, which stay whole.
        own = [groups[0][0] if groups else texts[row, 0] for row, groups in enumerate(rows)]
        return replace(question, mask=torch.from_numpy(np.stack(own)), images=None)
    mask = np.zeros((len(rows), most, image.shape[1]), bool)
    images = np.zeros_like(mask)
    for row, groups in enumerate(rows):
        for place, (text, seen) in enumerate(groups):
            mask[row, place], images[row, place] = text, seen
    return replace(question, mask=torch.from_numpy(mask), images=torch.from_numpy(images))


def counted(question_mask: Tensor, query: str) -> Tensor:
    """[..., S] bool: of the question, what counts: for "last" its last token, else all of it."""
    if query != "last":
        return question_mask
    count = question_mask.long().cumsum(-1)
    return question_mask & (count == count[..., -1:])
