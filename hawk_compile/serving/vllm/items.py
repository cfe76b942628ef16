"""What travels with an item from the processor to the model, and how an item's place in a prompt shrinks.

    before: <start> v v v v v v v v <end>            8 visual tokens, as the checkpoint's processor writes them
    after:  <start> v v <end>                        the number that is kept; which ones, the model finds out

Where a checkpoint writes text between the visual tokens of one item (rows of tiles, ends of lines), nobody knows yet
where that text will stand among the kept ones. All of it then becomes places of the item, and the model returns the
text's word embeddings in their places:

    before: <start> v v v v \\n v v v v \\n v v v v <end>
    after:  <start> v v v v v <end>                  3 visual tokens kept, and 2 ends of lines
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawk_compile.errors import InputError, UnsupportedModelError

FIELDS = ("question", "keep", "ids", "visual")
"""Names of what travels, without the prefix that tells it from the checkpoint's own."""

PREFIX = "hawk_"
MOST = 65535
"""The largest position in an item that travels exactly with its embeddings: two digits of base 256."""


@dataclass(frozen=True)
class Item:
    """One image or video.

    Attributes:
        question: [T] int64, the ids that vote; none if what is kept does not depend on them.
        keep: [] int64, how many visual tokens are kept.
        ids: [L] int64, all that a checkpoint's processor writes for it; see `Place`.
        visual: [L] bool, which of them are visual.
    """

    question: Tensor
    keep: Tensor
    ids: Tensor
    visual: Tensor

    def fields(self) -> dict[str, Tensor]:
        """By the names under which they travel."""
        return {PREFIX + name: getattr(self, name) for name in FIELDS}


def visual_tokens(kwargs_of_item: Mapping[str, Any]) -> int:
    """How many visual tokens an item has by what travels with it; 0 of one that stays whole."""
    visual = kwargs_of_item.get(PREFIX + "visual")
    return 0 if visual is None else int(visual.data.sum())


@dataclass(frozen=True)
class Place:
    """Where the visual tokens of an item stand in the ids that a checkpoint's processor writes for it."""

    before: list[int]
    inner: list[int]
    after: list[int]
    visual: Tensor
    """[N] bool over `inner`."""

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.before, *self.inner, *self.after]

    @property
    def all_visual(self) -> Tensor:
        """[L] bool over `ids`."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        mask[len(self.before) : len(self.before) + len(self.inner)] = self.visual
        return mask

    @property
    def text(self) -> list[int]:
        """The ids between the visual tokens."""
        return [number for number, seen in zip(self.inner, self.visual.tolist(), strict=True) if not seen]

    @property
    def count(self) -> int:
        """V, the visual tokens of the item."""
        return int(self.visual.sum())

    def shortened(self, keep: int) -> tuple[list[int], Callable[[list[int]], Tensor] | None]:
        """The ids with `keep` visual tokens, and which of them are places of the item; None: all."""
        places = keep + len(self.inner) - self.count
        ids = [*self.before, *[self.inner[0]] * places, *self.after]
        if not self.before and not self.after:
            return ids, None
        begin, length = len(self.before), len(ids)

        def is_embed(full: list[int]) -> Tensor:
            mask = torch.zeros(length, dtype=torch.bool)
            mask[begin : begin + places] = True
            return mask

        return ids, is_embed

    def item(self, question: Sequence[int], keep: int) -> Item:
        """What the model needs to know."""
        question_ids, ids = torch.tensor(question, dtype=torch.int64), torch.tensor(self.ids)
        return Item(question_ids, torch.tensor(keep), ids, self.all_visual)


def check_inner(place: Place, why: str) -> None:
    """Refuse an item with text between its visual tokens, of a model that would not read it as text.

    Args:
        why: it would not; empty: it would.

    Raises:
        UnsupportedModelError: such an item.
    """
    if why and len(place.inner) != place.count:
        raise UnsupportedModelError(
            f"this checkpoint writes text between the visual tokens of one item, and {why}: ask for pictures in one "
            'piece (without crops) and for videos as they are, by modalities=["image"] in hawk, or for '
            'mm_processor_kwargs={"hawk_ratio": 0}'
        )


def check_alone(place: Place, sounds: Collection[int]) -> None:
    """Refuse an item that holds places of another one, which would be read as text.

    Args:
        sounds: the ids that stand for audio.

    Raises:
        InputError: such an item.
    """
    if not set(sounds).isdisjoint(place.text):
        raise InputError(
            "audio stands between the visual tokens of a video of this prompt, and would be lost: send them apart, "
            'without use_audio_in_video, or ask for mm_processor_kwargs={"hawk_ratio": 0}'
        )


def check_extent(extent: int) -> None:
    """Refuse an item of which positions would not travel exactly: see `positions.py`.

    Args:
        extent: how many positions it takes. Those of a video may follow its seconds, and be more than its tokens.

    Raises:
        InputError: such an item.
    """
    if extent > MOST:
        raise InputError(
            f"an image or video of {extent} positions is longer than {MOST}: give fewer frames or a smaller "
            'picture, or ask for mm_processor_kwargs={"hawk_ratio": 0}'
        )


def place_of(full: list[int], is_embed: Tensor | None) -> Place | None:
    """How an item stands in its ids; None if none of them is visual."""
    visual = torch.ones(len(full), dtype=torch.bool) if is_embed is None else is_embed.bool()
    where = visual.nonzero().flatten().tolist()
    if not where:
        return None
    first, stop = where[0], where[-1] + 1
    return Place(full[:first], full[first:stop], full[stop:], visual[first:stop])
