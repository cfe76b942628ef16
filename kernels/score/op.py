"""The operators `hawk::score_folded`, `hawk::score_projected` and `hawk::score_each`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from hawk_compile.kernels.errors import OperandError
from hawk_compile.kernels.register import triton_op
from hawk_compile.kernels.score import by_token, reference

if find_spec("triton") is not None:
    from hawk_compile.kernels.score.triton_kernel import launch_folded, launch_projected


@triton_op("hawk::score_folded")
def score_folded(
    hidden: Tensor,
    visual_mask: Tensor,
    question_mask: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    head_weights: Tensor,
    normalization: str,
) -> Tensor:
    """Score every visual token by the text that votes, without making its keys (HAWK, arXiv 2604.07812).

    Exact where query and key are linear in `hidden`; with a norm between projection and RoPE use `score_projected`.
    Head h reads KV head h // (H // Hkv), where d = q_weight.shape[0] // H and Hkv = k_weight.shape[0] // d.

    Args:
        hidden: [B, S, D], any float dtype: what the query and key projections read, after the layer's input norm.
        visual_mask: [B, S] bool, True at visual tokens.
        question_mask: [B, S], bool or float >= 0: how much each token votes. A row that sums to 0 gets scores 0.
        q_weight: [H * d, D]. q_bias: [H * d] or None.
        k_weight: [Hkv * d, D]. k_bias: [Hkv * d] or None.
        head_weights: [H] fp32, the importance of each query head; its length says how many there are.
        normalization: "l2", "softmax" or "minmax", over the row's visual tokens, for each head.

    Returns:
        [B, S] fp32; 0 at non-visual positions. A non-finite raw score counts as 0.

    Raises:
        OperandError: a rank, dtype or weight shape that cannot be right, or an unknown normalization.
    """
    _check_common(visual_mask, question_mask, head_weights, normalization)
    _check_rank("hidden", hidden, "[B, S, D]")
    _check_float("hidden", hidden)
    _check_rank("q_weight", q_weight, "[H * d, D]")
    _check_rank("k_weight", k_weight, "[Hkv * d, D]")
    heads = head_weights.shape[0]
    rows = q_weight.shape[0]
    if rows % heads:
        raise OperandError(
            f"q_weight must have H * d rows with H = {heads}, the length of head_weights; got {tuple(q_weight.shape)}. "
            "Pass one head weight per query head."
        )
    head_dim = rows // heads
    if k_weight.shape[0] % head_dim:
        raise OperandError(
            f"k_weight must have Hkv * d rows with d = {head_dim}, which is q_weight's {rows} rows over {heads} head "
            f"weights; got {tuple(k_weight.shape)}. Check the number of head weights."
        )
    _check_groups(heads, k_weight.shape[0] // head_dim)
    if not q_weight.shape[1] == k_weight.shape[1] == hidden.shape[2]:
        raise OperandError(
            f"q_weight and k_weight must read vectors of hidden's last dimension, {hidden.shape[2]}; got "
            f"{tuple(q_weight.shape)} and {tuple(k_weight.shape)}. Pass the projections that read `hidden`."
        )
    for name, bias, weight in (("q_bias", q_bias, q_weight), ("k_bias", k_bias, k_weight)):
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
            raise OperandError(
                f"{name} must be [{weight.shape[0]}], one value per row of {name[0]}_weight; got {tuple(bias.shape)}. "
                "Pass None for a projection without a bias."
            )
    arguments = (
        hidden,
        visual_mask,
        question_mask,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        head_weights,
        normalization,
    )
    if hidden.is_cuda and find_spec("triton") is not None:
        return launch_folded(*arguments)
    return reference.score_folded(*arguments)


# Torch would run the whole definition on fake tensors to learn this shape, which takes a tenth of a second.
@score_folded.register_fake
def _(hidden: Tensor, visual_mask: Tensor, *rest: object) -> Tensor:
    return hidden.new_empty(visual_mask.shape, dtype=torch.float32)


@triton_op("hawk::score_projected")
def score_projected(
    query: Tensor,
    key: Tensor,
    visual_mask: Tensor,
    question_mask: Tensor,
    head_weights: Tensor,
    normalization: str,
) -> Tensor:
    """Score every visual token by the text that votes, from queries and keys (HAWK, arXiv 2604.07812).

    Args:
        query: [B, H, S, d], any float dtype, before RoPE and after the query norm if there is one. Where only part of a
            head rotates, as in latent attention (MLA), the whole head: that part before it rotates.
        key: [B, Hkv, S, d], likewise. Head h reads KV head h // (H // Hkv).
        visual_mask, question_mask, head_weights, normalization: as in `score_folded`.

    Returns:
        [B, S] fp32; 0 at non-visual positions. A non-finite raw score counts as 0.

    Raises:
        OperandError: a rank, dtype or head count that cannot be right, or an unknown normalization.
    """
    _check_common(visual_mask, question_mask, head_weights, normalization)
    _check_query_and_key(query, key, head_weights, "[B, H, S, d]")
    arguments = (query, key, visual_mask, question_mask, head_weights, normalization)
    if query.is_cuda and find_spec("triton") is not None:
        return launch_projected(*arguments)
    return reference.score_projected(*arguments)


@score_projected.register_fake
def _(query: Tensor, key: Tensor, visual_mask: Tensor, *rest: object) -> Tensor:
    return query.new_empty(visual_mask.shape, dtype=torch.float32)


@triton_op("hawk::score_each")
def score_each(
    query: Tensor,
    key: Tensor,
    visual_mask: Tensor,
    question_mask: Tensor,
    head_weights: Tensor,
    normalization: str,
    specific: bool,
) -> Tensor:
    """Score every visual token by each of the question's tokens by itself; see `hawk_compile.kernels.score.by_token`.

    Args:
        query: [B, H, T, d], any float dtype: of the question alone, before RoPE and after a query norm.
        key: [B, Hkv, S, d], likewise. Head h reads KV head h // (H // Hkv).
        visual_mask, head_weights, normalization: as in `score_folded`.
        question_mask: [B, T] bool, which of the queries count.
        specific: weigh the tokens by how specific their attention is; else they count alike.

    Returns:
        [B, S] fp32; 0 at non-visual positions. A non-finite raw score counts as 0.

    Raises:
        OperandError: a rank, dtype or head count that cannot be right, or an unknown normalization.
    """
    _check_common(visual_mask, question_mask, head_weights, normalization)
    _check_query_and_key(query, key, head_weights, "[B, H, T, d]")
    # An operator's own arithmetic is not autocast's business.
    with torch.autocast(query.device.type, enabled=False):
        return by_token.score_each(query, key, visual_mask, question_mask, head_weights, normalization, specific)


@score_each.register_fake
def _(query: Tensor, key: Tensor, visual_mask: Tensor, *rest: object) -> Tensor:
    return query.new_empty(visual_mask.shape, dtype=torch.float32)


# B and S are left unchecked: comparing them would put a guard on a symbolic size.
def _check_common(visual_mask: Tensor, question_mask: Tensor, head_weights: Tensor, normalization: str) -> None:
    if normalization not in reference.NORMALIZATIONS:
        known = ", ".join(reference.NORMALIZATIONS)
        raise OperandError(f"normalization must be one of {known}; got {normalization!r}.")
    _check_rank("visual_mask", visual_mask, "[B, S]")
    if visual_mask.dtype != torch.bool:
        raise OperandError(
            f"visual_mask must be bool, True at visual tokens; got {visual_mask.dtype}. Pass `mask != 0`."
        )
    _check_rank("question_mask", question_mask, "[B, S]")
    if question_mask.dtype != torch.bool:
        _check_float("question_mask", question_mask)
    _check_rank("head_weights", head_weights, "[H]")
    _check_float("head_weights", head_weights)
    if head_weights.shape[0] == 0:
        raise OperandError("head_weights must be [H] with H > 0; got [0]. Pass one weight per query head.")


def _check_query_and_key(query: Tensor, key: Tensor, head_weights: Tensor, query_shape: str) -> None:
    for name, value, shape in (("query", query, query_shape), ("key", key, "[B, Hkv, S, d]")):
        _check_rank(name, value, shape)
        _check_float(name, value)
    if query.shape[1] != head_weights.shape[0]:
        raise OperandError(
            f"head_weights must be [H] with H = {query.shape[1]}, query's second dimension; got "
            f"{tuple(head_weights.shape)}. Pass one head weight per query head."
        )
    _check_groups(query.shape[1], key.shape[1])
    if query.shape[3] != key.shape[3]:
        raise OperandError(
            f"key must have query's last dimension, {query.shape[3]}; got {key.shape[3]}. "
            "Pass query and key of one attention, both before RoPE."
        )


def _check_rank(name: str, value: Tensor, shape: str) -> None:
    if value.dim() != shape.count(",") + 1:
        raise OperandError(f"{name} must be {shape}; got {value.dim()} dimensions: {tuple(value.shape)}. Reshape it.")


def _check_float(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise OperandError(f"{name} must have a floating-point dtype; got {value.dtype}. Convert it with .float().")


def _check_groups(heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise OperandError(
            f"the number of query heads must be a multiple of the number of KV heads; got {heads} and {kv_heads}. "
            "Check head_weights: its length is the number of query heads."
        )
