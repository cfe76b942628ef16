"""What a check of a tiny model gives, and how two results are compared."""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hawk_compile.exporting.formats import FORMATS

LONGEST = 200
"""Characters that are kept of an error of several lines."""
OPEN = ("unasked", "untried")
"""Statuses that say nothing of the model."""
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Outcome:
    """What a check gave.

    Attributes:
        status: "right", "wrong", "refused" (by an error of ours that says what of the model stands against pruning),
            "failed", "unasked" where the tiny model has nothing to check it with, or "untried" where it could be asked
            and was not: of an export a package of the model is missing here, of videos no tiny model has one.
        detail: the largest difference, or the error.
        seconds: it took.
    """

    status: str
    detail: str
    seconds: float


@dataclass
class Survey:
    """The outcomes of one model's checks by name, in the order they ran; an export's name is its format.

    Attributes:
        model_type: of its config; several tiny models may have one, with other layers or sizes.
        model_class: the model's class in transformers.
        layer: the decoder layer that scores.
        notes: what is special of the tiny model, in words.
    """

    name: str
    model_type: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    model_class: str = ""
    layer: int = 0
    notes: tuple[str, ...] = ()

    @property
    def pruned(self) -> dict[str, Outcome]:
        """Those of `optimize`: a model that cannot be exported is right all the same."""
        return {name: outcome for name, outcome in self.outcomes.items() if name not in FORMATS}

    @property
    def asked(self) -> list[Outcome]:
        """Of what the tiny model has something to check with."""
        return [outcome for outcome in self.pruned.values() if outcome.status not in OPEN]

    @property
    def right(self) -> bool:
        return {outcome.status for outcome in self.asked} == {"right"}

    @property
    def refusal(self) -> str | None:
        """Why the model is refused; None unless every call that would prune is."""
        refused = {outcome.status for outcome in self.asked} == {"refused"}
        return self.asked[0].detail.partition(": ")[2] if refused else None

    @property
    def trouble(self) -> str | None:
        """What is not right first."""
        wrong = (f"{name}: {each.detail}" for name, each in self.pruned.items()
                 if each.status not in ("right", *OPEN))
        return next(wrong, None)

    @property
    def seconds(self) -> float:
        """Of all but the exports."""
        return sum(outcome.seconds for outcome in self.pruned.values())

    @property
    def unexported(self) -> dict[str, Outcome]:
        """The formats that it was not written to, or not rightly."""
        return {
            name: outcome for name, outcome in self.outcomes.items() if name in FORMATS and outcome.status != "right"
        }

    def with_earlier(self, earlier: "Survey | None") -> "Survey":
        """This survey with the outcomes of an earlier one where a check did not run."""
        if earlier is None:
            return self
        return replace(
            self, outcomes={**earlier.outcomes, **self.outcomes}, layer=self.layer if self.pruned else earlier.layer
        )


class Unasked(Exception):
    """The tiny model has nothing to check this with."""


class Untried(Exception):
    """The model could be asked this, and the tiny model's inputs do not."""


class Misdescribed(Exception):
    """The JSON of a tiny model describes none that runs without us."""


class Wrong(Exception):
    """Two results differ that must not."""


def equal(what: str, left: Tensor, right: Tensor, tolerance: float = 0.0) -> float:
    """The largest difference of two results of floating numbers, of any one shape.

    Infinities and the ends of the type's range, which forbid a token, must stand in the same places; all other numbers
    are compared, and differ by no more than a share of the largest of them.

    Args:
        tolerance: that share. One unit of rounding of numbers near 1 is allowed beside it, unless it is 0.

    Raises:
        Wrong: they differ by more, hold NaN, or nothing that can be compared.
    """
    if left.shape != right.shape:
        raise Wrong(f"{what}: shape {tuple(left.shape)} instead of {tuple(right.shape)}")
    if left.isnan().any() or right.isnan().any():
        raise Wrong(f"{what}: NaN")
    extreme = is_extreme(left) | is_extreme(right)
    if not left[extreme].equal(right[extreme]):
        raise Wrong(f"{what}: infinities, or ends of the type's range, stand in other places")
    if extreme.all():
        raise Wrong(f"{what}: no ordinary number to compare, of {left.numel()}")
    left, right = left[~extreme].double(), right[~extreme].double()
    difference, largest = float((left - right).abs().max()), float(right.abs().max())
    if difference > (max(tolerance * largest, EPSILON) if tolerance else 0.0):
        raise Wrong(f"{what}: off by {difference:.2g} where the largest is {largest:.2g}")
    return difference


def is_extreme(value: Tensor) -> Tensor:
    """Where a tensor holds an infinity or an end of its type's range."""
    return value.isinf() | (value.abs() >= torch.finfo(value.dtype).max)


def unlike(what: str, left: Tensor, right: Tensor, tolerance: float) -> None:
    """The control of a check that two results are equal: these must not be.

    Raises:
        Wrong: they are.
    """
    try:
        difference = equal(what, left, right, tolerance)
    except Wrong:
        return
    raise Wrong(f"the check cannot fail: {what} differ by {difference:.2g} only")


def brief(text: str) -> str:
    """An error's text, as one line; the beginning of it, where it has several: logs of compilers go on for pages."""
    if "\n" not in text:
        return text
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def without_folders(text: str) -> str:
    """A text that names files of packages as every machine does."""
    return re.sub(r"[^\s(]*/site-packages/", "", text)
