"""What a prefill and its score cost, counted without running them."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hawk_compile.capture.attention import capturing
from hawk_compile.capture.modalities import positions_by_images
from hawk_compile.runtime.positions import axes_of
from hawk_compile.tools.inspection.sample import embedding_weight
from hawk_compile.tools.inspection.without_weights import META


def count_flops(model: PreTrainedModel, length: int) -> int | None:
    """FLOPs of the decoder over `length` embeddings, with one position's logits; None where it cannot run on meta."""
    weight = embedding_weight(model)
    embeds = torch.empty((1, length, weight.shape[1]), dtype=weight.dtype, device=META)
    # A mask over queries and keys is taken as it is; any other would be looked into, and meta tensors hold no values.
    mask = torch.ones((1, 1, length, length), dtype=torch.bool, device=META)
    positions = torch.zeros((1, length), dtype=torch.long, device=META)
    if positions_by_images(model):
        positions = positions.expand(axes_of(model), 1, length)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), capturing(model), counter:
            model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return counter.get_total_flops()


def scoring_flops(form: str, width: int, heads: int, kv_heads: int, depth: int, length: int) -> int:
    """FLOPs of the score of one row, as `kernels/score/reference.py` computes it."""
    if form == "folded":
        return 2 * width * heads * depth * 2 + 2 * length * width * heads
    return 2 * length * width * (heads + kv_heads) * depth + 2 * length * heads * depth


def work_left(flops: int | None, kept_flops: int | None, scoring_flops: int) -> float | None:
    """(pruned prefill + scoring) / unpruned prefill; None where either prefill was not counted."""
    return None if not flops or kept_flops is None else (kept_flops + scoring_flops) / flops
