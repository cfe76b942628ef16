"""HAWK's scores by every token of the question, instead of by their mean (an extension of arXiv 2604.07812).

With t the question's tokens, v the visual ones, kv(h) the KV head of query head h:

    raw[t, h, v] = q[t, h] . k[v, kv(h)] / sqrt(d)
    score[v]     = sum_t a[t] sum_h w[h] * normalize_v(raw[t, h, :])[v]           a sums to 1

`query="each"` lets all of them count alike. `query="content"` lets one count by how specific it is, the information
that its attention to the visual tokens carries: a[t] ~ log V - sum_h w[h] entropy(softmax_v(raw[t, h, :])).

The normalisation stands inside the sum over t, so a mean of queries does not do: keys are made, and the last
`MOST_TOKENS` of a row's question are looked at. All arithmetic is fp32.
"""

import torch
from torch import Tensor

from hawk_compile.kernels.score.reference import combine_heads

MOST_TOKENS = 64
"""Most tokens of a question that are scored each by itself: the last ones."""


def last_of_question(question_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The last `MOST_TOKENS` positions of each row's question, in order behind the filling.

    Args:
        question_mask: [B, S] bool.

    Returns:
        positions [B, MOST_TOKENS] int64, and which of them are no filling [B, MOST_TOKENS] bool.
    """
    rows, length = question_mask.shape
    count = question_mask.long().cumsum(1)
    left = count[:, -1:] - count  # tokens of the question behind each position
    slot = torch.where(question_mask & (left < MOST_TOKENS), MOST_TOKENS - 1 - left, MOST_TOKENS)
    position = torch.arange(length, device=question_mask.device).expand(rows, length)
    empty = torch.zeros((rows, MOST_TOKENS + 1), dtype=torch.int64, device=question_mask.device)
    return empty.scatter(1, slot, position)[:, :MOST_TOKENS], empty.scatter(1, slot, 1)[:, :MOST_TOKENS] != 0


def last_token(question_mask: Tensor) -> Tensor:
    """[B, S] bool: the last position of each row's question."""
    count = question_mask.long().cumsum(1)
    return question_mask & (count == count[:, -1:])


def score_each(
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, Hkv, S, d]
    visual_mask: Tensor,  # [B, S] bool
    question_mask: Tensor,  # [B, T] bool
    head_weights: Tensor,  # [H]
    normalization: str,
    specific: bool,
) -> Tensor:
    """Scores [B, S] fp32, 0 at non-visual positions; query and key before RoPE, `specific` weighs the tokens."""
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(rows, kv_heads, -1, head_dim)  # [B, Hkv, G * T, d]
    raw = (grouped @ key.float().transpose(2, 3)).reshape(rows, heads, tokens, -1) * head_dim**-0.5
    raw = raw.transpose(1, 2).flatten(0, 1)  # [B * T, H, S]
    visual = visual_mask.unsqueeze(1).expand(-1, tokens, -1).flatten(0, 1)  # [B * T, S]
    one_token = question_mask.reshape(-1, 1)  # [B * T, 1]
    scores = combine_heads(raw, visual, one_token, head_weights, normalization).reshape(rows, tokens, -1)
    share = question_mask.float()
    if specific:
        share = share * specificity(raw, visual, head_weights).reshape(rows, tokens)
    total = share.sum(1, keepdim=True)
    # Tokens without any information between them, as before a single visual token, count alike.
    share = torch.where(total > 0, share, question_mask.float())
    total = torch.where(total > 0, total, question_mask.float().sum(1, keepdim=True).clamp_min(1.0))
    return ((share / total).unsqueeze(1) @ scores).squeeze(1)


def specificity(raw: Tensor, visual: Tensor, head_weights: Tensor) -> Tensor:
    """[N] in nats, >= 0: log V less the entropy of each head's softmax over the visual tokens, weighted by head."""
    seen = visual.unsqueeze(1)  # [N, 1, S]
    raw = torch.where(seen & raw.isfinite(), raw, 0.0)
    log_share = raw - torch.where(seen, raw, -torch.inf).logsumexp(-1, keepdim=True)  # [N, H, S]
    negative_entropy = torch.where(seen, log_share.exp() * log_share, 0.0).sum(-1)  # [N, H]
    count = visual.float().sum(-1).clamp_min(1.0)
    weights = head_weights.float()
    found = (negative_entropy * weights).sum(-1) / weights.sum() + count.log()
    return torch.where(visual.any(-1), found, 0.0).clamp_min(0.0)


def split_heads(hidden: Tensor, weight: Tensor, bias: Tensor | None, head_dim: int) -> Tensor:
    """A projection of [B, T, D] by heads: [B, H, T, d]."""
    return torch.nn.functional.linear(hidden, weight, bias).unflatten(2, (-1, head_dim)).transpose(1, 2)
