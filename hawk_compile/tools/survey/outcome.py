"""What a check of a tiny model gives, and how two results are compared."""

import re
from dataclasses import dataclass, field, replace

from torch import Tensor

from hawk_compile.exporting.formats import FORMATS


@dataclass(frozen=True)
class Outcome:
    """What a check gave.

    Attributes:
        status: "right", "wrong", "refused" (by an error of ours that says what cannot be done), "failed", or "unasked"
            where the tiny model has nothing to check it with.
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
        model_class: the model's class in transformers.
        layer: the decoder layer that scores.
    """

    name: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    model_class: str = ""
    layer: int = 0

    @property
    def pruned(self) -> dict[str, Outcome]:
        """Those of `optimize`: a model that cannot be exported is right all the same."""
        return {name: outcome for name, outcome in self.outcomes.items() if name not in FORMATS}

    @property
    def right(self) -> bool:
        statuses = {outcome.status for outcome in self.pruned.values()}
        return statuses <= {"right", "unasked"} and "right" in statuses

    @property
    def refusal(self) -> str | None:
        """Why the model is refused; None unless every call that would prune is."""
        asked = [outcome for outcome in self.pruned.values() if outcome.status != "unasked"]
        refused = asked and all(outcome.status == "refused" for outcome in asked)
        return asked[0].detail.partition(": ")[2] if refused else None

    @property
    def trouble(self) -> str | None:
        """What is not right first."""
        wrong = (f"{name}: {each.detail}" for name, each in self.pruned.items()
                 if each.status not in ("right", "unasked"))
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


class Wrong(Exception):
    """Two results differ that must not."""


def equal(what: str, left: Tensor, right: Tensor, tolerance: float = 0.0) -> float:
    if left.shape != right.shape:
        raise Wrong(f"{what}: shape {tuple(left.shape)} instead of {tuple(right.shape)}")
    if left.isnan().any() or right.isnan().any():
        raise Wrong(f"{what}: NaN")
    difference = float((left.double() - right.double()).abs().max()) if left.numel() else 0.0
    if difference > tolerance * max(1.0, float(right.abs().max())):
        raise Wrong(f"{what}: off by {difference:.2g} where the largest is {float(right.abs().max()):.2g}")
    return difference


def without_folders(text: str) -> str:
    """A text that names files of packages as every machine does."""
    return re.sub(r"[^\s(]*/site-packages/", "", text)
