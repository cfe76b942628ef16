"""A call's own question: the arguments `question_ids` and `question_mask` of forward and generate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import InputError
from hawk_compile.plan.given import id_lists, mask_of_ids
from hawk_compile.plan.ids import SpecialIds

QUESTION_ARGUMENTS = ("question_ids", "question_mask")


@dataclass(frozen=True)
class AskedQuestion:
    """What a call says of who votes; one of the two.

    Attributes:
        ids: [B, T], or a list of ids for each row: tokens of the prompt.
        mask: [B, S], nonzero for the tokens that vote.
    """

    ids: Any = None
    mask: Tensor | None = None

    @property
    def numbers(self) -> set[int]:
        """The ids of all rows."""
        return set() if self.ids is None else {number for row in id_lists(self.ids, ()) for number in row}

    def arguments(self) -> dict[str, Any]:
        """As a call is given it."""
        return {name: value for name, value in zip(QUESTION_ARGUMENTS, (self.ids, self.mask), strict=True)
                if value is not None}  # fmt: skip

    def repeated(self, rows: int) -> "AskedQuestion":
        """For `rows` rows, among which generate repeats those it was given (beams, several sequences)."""
        asked = self.ids if self.mask is None else self.mask
        count = len(asked)
        if not count or rows == count or rows % count:
            return self
        if isinstance(asked, Tensor):
            more: Any = asked.repeat_interleave(rows // count, 0)
        else:
            more = [row for row in asked for _ in range(rows // count)]
        return AskedQuestion(more) if self.mask is None else AskedQuestion(mask=more)

    def on_prompt(
        self, ids: Tensor, real: Tensor, special: SpecialIds, prompt: int | None, earlier: int = 0
    ) -> Tensor:
        """[B, S] on the host, nonzero for the question.

        Args:
            ids, real: [B, S] on the host.
            prompt: positions from here on were generated; None if none were.
            earlier: positions of the conversation that the cache held before, which a mask may cover too.

        Raises:
            InputError: a mask of another shape, or ids that do not stand in their row.
        """
        rows, length = ids.shape
        covered = length if prompt is None else prompt
        if self.mask is None:
            return mask_of_ids(ids, real & (torch.arange(length, device="cpu") < covered), self.ids, special)
        if tuple(self.mask.shape) not in ((rows, covered), (rows, earlier + covered)):
            whole = f", or [{rows}, {earlier + covered}] like the whole conversation" if earlier else ""
            raise InputError(
                f"question_mask must have shape [{rows}, {covered}] like the prompt{whole}, got "
                f"{tuple(self.mask.shape)}: give one of that shape, 1 where a token is of the question"
            )
        mask = self.mask.cpu()[:, self.mask.shape[1] - covered :]
        return torch.nn.functional.pad(mask, (0, length - covered))


def take_question(kwargs: dict[str, Any]) -> AskedQuestion | None:
    """Take a call's own question out of its arguments; None where it has none.

    Raises:
        InputError: both ways at once, or something that is no mask.
    """
    ids, mask = (kwargs.pop(name, None) for name in QUESTION_ARGUMENTS)
    if ids is None and mask is None:
        return None
    if ids is not None and mask is not None:
        raise InputError("a call takes either question_ids or question_mask, got both: give one of them")
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(
            f"question_mask must be a tensor [B, S], got {type(mask).__name__}: give one, 1 where a token is of the "
            "question, or question_ids"
        )
    if ids is not None and not isinstance(ids, (Tensor, list, tuple)):
        raise InputError(
            f"question_ids must be [B, T] or a list of ids for each row, got {type(ids).__name__}: give the ids of the "
            "question as they stand in input_ids"
        )
    return AskedQuestion(ids, mask)
