"""The definition of HAWK's scores in plain PyTorch (arXiv 2604.07812, section 3).

With t the voting (instruction) tokens, v the visual tokens, kv(h) the KV head of query head h:

    raw[h, v]   = mean_t(q[t, h]) . k[v, kv(h)] / sqrt(d)        a non-finite value counts as 0
    score[v]    = sum_h w[h] * normalize_v(raw[h, :])[v]

`score_projected` takes q and k. `score_folded` takes what they are made of, q = W_q x + b_q and k = W_k x + b_k, and
never makes k, since the dot product can be taken in the space of x:

    q_bar[h] = W_q[h] mean_t(x_t) + b_q[h]
    u[h]     = W_k[kv(h)]^T q_bar[h]        c[h] = b_k[kv(h)] . q_bar[h]
    raw[h, v] = (u[h] . x_v + c[h]) / sqrt(d)

All arithmetic is fp32, whatever the dtype of the inputs.
"""

import torch
from torch import Tensor

from hawk_compile.kernels.errors import OperandError

NORMALIZATIONS = ("l2", "softmax", "minmax")

# A smaller norm (l2) or range (minmax) is taken as this much: a head without any signal adds 0, not 0/0. The value is
# that of torch.nn.functional.normalize.
FLOOR = 1e-12


def score_folded(
    hidden: Tensor,  # [B, S, D]
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, S] bool or float
    q_weight: Tensor,  # [H * d, D]
    q_bias: Tensor | None,  # [H * d]
    k_weight: Tensor,  # [Hkv * d, D]
    k_bias: Tensor | None,  # [Hkv * d]
    head_weights: Tensor,  # [H]
    normalization: str,
) -> Tensor:
    """Scores [B, S] fp32 from the normed hidden states; see `hawk_compile.kernels.score.op.score_folded`."""
    heads = head_weights.shape[0]
    width = q_weight.shape[1]
    head_dim = q_weight.shape[0] // heads
    kv_heads = k_weight.shape[0] // head_dim
    hidden = hidden.float()

    query = torch.nn.functional.linear(
        mean_of_question(hidden, question_mask), q_weight.float(), None if q_bias is None else q_bias.float()
    )
    query = query.view(-1, kv_heads, heads // kv_heads, head_dim)  # [B, Hkv, G, d]
    folded = query @ k_weight.float().view(kv_heads, head_dim, width)  # [B, Hkv, G, D]
    raw = folded.reshape(-1, heads, width) @ hidden.transpose(1, 2)  # [B, H, S]
    if k_bias is not None:
        offset = (query * k_bias.float().view(kv_heads, 1, head_dim)).sum(-1)  # [B, Hkv, G]
        raw = raw + offset.reshape(-1, heads, 1)
    return combine_heads(raw * head_dim**-0.5, visual_mask, question_mask, head_weights, normalization)


def score_projected(
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, Hkv, S, d]
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, S] bool or float
    head_weights: Tensor,  # [H]
    normalization: str,
) -> Tensor:
    """Scores [B, S] fp32 from q and k before RoPE; see `hawk_compile.kernels.score.op.score_projected`."""
    heads, head_dim = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    mean = mean_of_question(query.float(), question_mask.unsqueeze(1))  # [B, H, d]
    mean = mean.view(-1, kv_heads, heads // kv_heads, head_dim)
    raw = mean @ key.float().transpose(2, 3)  # [B, Hkv, G, S]
    raw = raw.reshape(visual_mask.shape[0], heads, -1) * head_dim**-0.5  # [B, H, S]
    return combine_heads(raw, visual_mask, question_mask, head_weights, normalization)


def mean_of_question(values: Tensor, question_mask: Tensor) -> Tensor:
    """sum_s m[s] x[s] / sum_s m[s] over the tokens with m > 0: x [..., S, D], question_mask m [..., S] -> [..., D]."""
    weights = question_mask.float()
    # Not a product with the mask alone: 0 * NaN is NaN, and padding may hold anything.
    voting = torch.where((weights > 0).unsqueeze(-1), values * weights.unsqueeze(-1), 0.0)
    total = weights.sum(-1, keepdim=True)
    return voting.sum(-2) / torch.where(total > 0, total, 1.0)


def combine_heads(
    raw: Tensor,  # [B, H, S] fp32
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, S] bool or float
    head_weights: Tensor,  # [H]
    normalization: str,
) -> Tensor:
    """Normalise each head over the row's visual tokens and add up the heads: [B, S] fp32, 0 at non-visual positions."""
    visual = visual_mask.unsqueeze(1)  # [B, 1, S]
    raw = torch.where(visual & raw.isfinite(), raw, 0.0)
    if normalization == "l2":
        shares = raw / (raw * raw).sum(-1, keepdim=True).sqrt().clamp_min(FLOOR)
    elif normalization == "softmax":
        top = torch.where(visual, raw, torch.finfo(torch.float32).min).amax(-1, keepdim=True)
        weight = torch.where(visual, (raw - top).exp(), 0.0)
        shares = weight / weight.sum(-1, keepdim=True).clamp_min(FLOOR)  # at least 1 where a row has visual tokens
    elif normalization == "minmax":
        largest = torch.finfo(torch.float32).max
        low = torch.where(visual, raw, largest).amin(-1, keepdim=True)
        high = torch.where(visual, raw, -largest).amax(-1, keepdim=True)
        shares = (raw - low) / (high - low).clamp_min(FLOOR)
    else:
        raise OperandError(f"normalization must be one of {', '.join(NORMALIZATIONS)}; got {normalization!r}")
    scores = (shares * head_weights.float().unsqueeze(-1)).sum(1)  # [B, S]
    counted = visual_mask & (question_mask.float().sum(-1, keepdim=True) > 0)
    return torch.where(counted, scores, 0.0)
