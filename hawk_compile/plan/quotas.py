"""What every image (or frame of a video) of a batch keeps at least, as `min_per_image` and `quota` ask for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.settings.config import HawkConfig


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
    input_ids: Tensor, placeholders: dict[str, int | None], sizes: dict[str, list[int]], config: HawkConfig
) -> Quotas:
    """The images' places in a batch, and what each keeps.

    Args:
        input_ids: [B, S] int64.
        placeholders: modality -> id that waits for its features.
        sizes: modality -> tokens of each image or frame, in the order of the prompts.

    Raises:
        InputError: two modalities that share one placeholder, so that their images cannot be told apart.
        UnsupportedCallError: features that the encoder hands on as one and that stand in several rows.
    """
    image = torch.full_like(input_ids, -1)
    floor, total = torch.zeros_like(image), torch.zeros_like(image[:, 0])
    known = 0
    if len({placeholders.get(modality) for modality in sizes}) < len(sizes):
        raise InputError(
            f"min_per_image, quota and normalize_per need prompts whose {' and '.join(sizes)} tokens have ids of their "
            "own, and this model's have the same: give one kind of them in a call, or leave these settings out"
        )
    for modality, counts in sizes.items():
        mask = torch.isin(input_ids, torch.tensor(placeholders[modality], device=input_ids.device))
        edges = torch.tensor(counts, device=input_ids.device).cumsum(0)
        floors = torch.tensor([*map(config.floor, counts), 0], device=input_ids.device)
        refuse_joined_rows(modality, mask, edges)
        rank = mask.flatten().long().cumsum(0) - 1
        unit = torch.bucketize(rank, edges, right=True)  # len(counts) for positions that have no features
        begins = (rank == torch.nn.functional.pad(edges, (1, 0))[unit]).view_as(mask) & mask
        unit = unit.view_as(mask)
        image = image.where(~mask, unit + known)
        floor = floor.where(~mask, floors[unit])
        total = total + (floor * begins).sum(1)
        known += len(counts)
    return Quotas(image, floor, total, sum(map(sum, sizes.values())))


def refuse_joined_rows(modality: str, mask: Tensor, edges: Tensor) -> None:
    """Refuse features that the encoder hands on as one image, and that stand in more than one row.

    Args:
        mask: [B, S] bool, where features stand.
        edges: [images], features up to the end of each image.
    """
    row = mask.nonzero()[:, 0]
    if not len(edges) or len(row) != int(edges[-1]):
        return  # refused by the placeholders' number
    begins = torch.nn.functional.pad(edges, (1, 0))[:-1]
    full = edges > begins
    if not row[begins[full]].equal(row[edges[full] - 1]):
        raise UnsupportedCallError(
            f"min_per_image, quota and normalize_per are of images, and this model's encoder hands on the {modality}s "
            "of several rows as one, so that nothing says which tokens are of one image: give the rows one by one, or "
            "leave these settings out"
        )
