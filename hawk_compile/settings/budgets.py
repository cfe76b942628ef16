"""How many visual tokens are kept where one ratio does not say it: as few as hold a share of the score."""

from dataclasses import dataclass
from typing import Any

from hawk_compile.errors import ConfigError

Count = int | float
"""A number of tokens (int), or a fraction of a row's visual tokens (float)."""


@dataclass(frozen=True)
class Adaptive:
    """Each row keeps the fewest visual tokens that hold a share of its HAWK score; negative scores hold nothing.

    That, with what `min_per_image` guarantees among them, is their number; which are kept is the selector's choice.

    The number is found inside the compiled graph, which then reads it from the device: once a prefill. The rows of a
    batch run as long as the longest of them.

    Attributes:
        mass: the share of the score that is kept, in (0, 1].
        min: least number of tokens (int >= 1), or fraction of the row's visual tokens (float in (0, 1]), kept.
        max: most of them, likewise; it stands above `min`. None: what `ratio` leaves.
    """

    mass: float = 0.9
    min: Count = 1
    max: Count | None = None

    def __post_init__(self) -> None:
        if not is_number(self.mass) or not 0 < self.mass <= 1:
            raise ConfigError(f"mass is the share of the score that is kept and must be in (0, 1], got {self.mass!r}")
        for name, bound in (("min", self.min), ("max", self.max)):
            whole = isinstance(bound, int) and not isinstance(bound, bool) and bound >= 1
            share = isinstance(bound, float) and 0 < bound <= 1
            if not (whole or share or (name == "max" and bound is None)):
                raise ConfigError(
                    f"{name} must be a number of tokens (an int of at least 1) or a fraction of the row's visual "
                    f"tokens that is kept (a float in (0, 1]), got {bound!r}"
                )
        if self.max is not None and type(self.min) is type(self.max) and self.min > self.max:
            raise ConfigError(
                f"min must not be above max, got min={self.min!r} and max={self.max!r}: give a max of at least "
                f"{self.min!r}"
            )

    def bounds(self, count: int, most: int) -> tuple[int, int]:
        """(least, most) tokens that a row with `count` visual tokens keeps; `most` if there is no `max`."""
        top = most if self.max is None else tokens(self.max, count)
        return min(tokens(self.min, count), top), top


def tokens(bound: Count, count: int) -> int:
    """A number of tokens, at least 1 and at most `count`."""
    wanted = bound if isinstance(bound, int) else -int(-bound * count // 1)  # rounded up
    return min(count, max(1, wanted))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
