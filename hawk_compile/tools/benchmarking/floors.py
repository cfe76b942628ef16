"""What a stage cannot be faster than, from operations, bytes, and what this machine does of both in a second."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.benchmarking.timing import Call, seconds
from hawk_compile.tools.inspection.flops import count_flops, scoring_flops, work_left
from hawk_compile.tools.inspection.inspect import Inspection
from hawk_compile.tools.inspection.without_weights import on_meta

COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes that are copied to measure the bandwidth: more than any cache holds."""
SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
ROUNDS = 7


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a copy, read and written, and FLOPs per second of a matrix product in the dtype."""

    bandwidth: float
    matmul: float


@dataclass(frozen=True)
class Floor:
    """Work of one prompt with B rows.

    Attributes:
        ratio: fraction of visual tokens removed.
        prompt_tokens, kept_tokens: S and S' of a row.
        flops, kept_flops: of the decoder's prefill at S and S'; a multiply-add is two, attention counts S x S. None
            where the decoder does not run on the meta device.
        attention_flops, kept_attention_flops: what attention has of these; a causal one needs but half of it.
        scoring_flops: of the score, to be added to `kept_flops`.
        scoring_bytes: the hidden states and projections read once, the kept rows read and written.
        decode_bytes, kept_decode_bytes: the decoder's weights and the keys and values of S and S', read once.
    """

    ratio: float
    prompt_tokens: int
    kept_tokens: int
    flops: int | None
    kept_flops: int | None
    attention_flops: int
    kept_attention_flops: int
    scoring_flops: int
    scoring_bytes: int
    decode_bytes: int
    kept_decode_bytes: int

    @property
    def flop_ratio(self) -> float | None:
        """As `work_left` has it."""
        return work_left(self.flops, self.kept_flops, self.scoring_flops)

    @property
    def causal_flop_ratio(self) -> float | None:
        """The same where attention skips what lies behind a query, as SDPA's kernels do."""
        if not self.flops or self.kept_flops is None:
            return None
        return self.least_flops(self.kept_flops) / (self.flops - self.attention_flops / 2)

    def least_flops(self, kept: int) -> float:
        """Of a pruned prefill with causal attention and the score."""
        return kept - self.kept_attention_flops / 2 + self.scoring_flops

    def seconds(self, stage: str, rates: Rates) -> float | None:
        """The least seconds of a pruned stage; None where neither operations nor bytes say anything."""
        if stage == "prefill" and self.kept_flops is not None:
            return self.least_flops(self.kept_flops) / rates.matmul
        if stage == "scoring":
            return max(self.scoring_bytes / rates.bandwidth, self.scoring_flops / rates.matmul)
        if stage == "decode":
            return self.kept_decode_bytes / rates.bandwidth
        return None


def floors(
    model: PreTrainedModel, site: Inspection, visual: int, length: int, rows: int, ratios: tuple[float, ...]
) -> list[Floor]:
    """The work of `rows` prompts of `length` tokens, `visual` of them visual, for each ratio removed.

    Args:
        site: what `hawk_compile.inspect` finds in the model, at any size.
    """
    meta = on_meta(model)
    whole = count_flops(meta, length)
    score = rows * scoring_flops(site.form, site.width, site.heads, site.kv_heads, site.head_dim, length)
    size = next(model.get_decoder().parameters()).element_size()
    projections = (site.heads + site.kv_heads) * site.head_dim * site.width * size
    weights = decoder_bytes(model)
    pairs = 4 * rows * site.layers * site.heads * site.head_dim
    token = 2 * site.layers * site.kv_heads * site.head_dim * size
    found = []
    for ratio in ratios:
        kept = length - visual + HawkConfig(ratio=ratio).kept(visual)
        pruned = count_flops(meta, kept)
        found.append(Floor(
            ratio, length, kept,
            None if whole is None else rows * whole,
            None if pruned is None else rows * pruned,
            pairs * length**2,
            pairs * kept**2,
            score,
            rows * (length + 2 * kept) * site.width * size + projections,
            weights + rows * length * token,
            weights + rows * kept * token,
        ))  # fmt: skip
    return found


def decoder_bytes(model: Any) -> int:
    """Bytes of the weights that every generated token reads: the layers and the head."""
    held = [*model.get_decoder().layers.parameters(), model.get_output_embeddings().weight]
    return sum(each.numel() * each.element_size() for each in held)


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy and multiply on the device; medians."""
    source = torch.ones(COPIED.get(device.type, COPIED["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_seconds(lambda: target.copy_(source), device)
    side = SIDE.get(device.type, SIDE["cpu"])
    left = torch.randn(side, side, device=device).to(dtype)
    return Rates(copied, 2 * side**3 / median_seconds(lambda: left @ left, device))


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    return statistics.median(seconds(Call("rate", None, lambda: function), device) for _ in range(ROUNDS))
