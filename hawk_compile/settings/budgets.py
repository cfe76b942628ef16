"""How many visual tokens are kept where one ratio for a whole prompt does not say it.

    Adaptive(mass=0.9)         each row keeps as few as hold that share of its score
    min_per_image, quota       every image (or frame of a video) keeps some, or its own share
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hawk_compile.errors import ConfigError, InputError

if TYPE_CHECKING:
    from hawk_compile.settings.config import HawkConfig

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
        for name, given in (("min", self.min), ("max", self.max)):
            whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
            share = isinstance(given, float) and 0 < given <= 1
            if not (whole or share or (name == "max" and given is None)):
                raise ConfigError(
                    f"{name} must be a number of tokens (an int of at least 1) or a fraction of the row's visual "
                    f"tokens that is kept (a float in (0, 1]), got {given!r}"
                )
        if self.max is not None and type(self.min) is type(self.max) and self.min > self.max:
            raise ConfigError(f"min must not be above max, got min={self.min!r} and max={self.max!r}")

    def bounds(self, count: int, most: int) -> tuple[int, int]:
        """(least, most) tokens that a row with `count` visual tokens keeps; `most` if there is no `max`."""
        top = most if self.max is None else tokens(self.max, count)
        return min(tokens(self.min, count), top), top


def tokens(given: Count, count: int) -> int:
    """A number of tokens, at least 1 and at most `count`."""
    wanted = given if isinstance(given, int) else -int(-given * count // 1)  # rounded up
    return min(count, max(1, wanted))


def is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


@dataclass(frozen=True)
class Quotas:
    """What every image of a batch keeps at least.

    Attributes:
        image: [B, S] int64, which image a position belongs to, counted over the batch; -1 elsewhere.
        floor: [B, S] int64, the tokens that its image keeps at least; 0 elsewhere.
        total: [B] int64, the sum over a row's images.
        tokens: visual tokens of all images.
    """

    image: Tensor
    floor: Tensor
    total: Tensor
    tokens: int


def quotas(
    input_ids: Tensor, placeholders: dict[str, int | None], sizes: dict[str, list[int]], config: "HawkConfig"
) -> Quotas:
    """The images' places in a batch, and what each keeps.

    Args:
        input_ids: [B, S] int64.
        placeholders: modality -> id that waits for its features.
        sizes: modality -> tokens of each image or frame, in the order of the prompts.

    Raises:
        InputError: two modalities that share one placeholder, so that their images cannot be told apart.
    """
    image = torch.full_like(input_ids, -1)
    floor, total = torch.zeros_like(image), torch.zeros_like(image[:, 0])
    known = 0
    if len({placeholders.get(modality) for modality in sizes}) < len(sizes):
        raise InputError(
            f"min_per_image and quota need prompts whose {' and '.join(sizes)} tokens have ids of their own, and this "
            "model's have the same: give one kind of them in a call, or leave both settings out"
        )
    for modality, counts in sizes.items():
        mask = torch.isin(input_ids, torch.tensor(placeholders[modality], device=input_ids.device))
        edges = torch.tensor(counts, device=input_ids.device).cumsum(0)
        floors = torch.tensor([*map(config.floor, counts), 0], device=input_ids.device)
        rank = mask.flatten().long().cumsum(0) - 1
        unit = torch.bucketize(rank, edges, right=True)  # len(counts) for positions that have no features
        begins = (rank == torch.nn.functional.pad(edges, (1, 0))[unit]).view_as(mask) & mask
        unit = unit.view_as(mask)
        image = image.where(~mask, unit + known)
        floor = floor.where(~mask, floors[unit])
        total = total + (floor * begins).sum(1)
        known += len(counts)
    return Quotas(image, floor, total, sum(map(sum, sizes.values())))
