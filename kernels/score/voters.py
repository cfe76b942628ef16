"""HAWK's scores with every voting token's own, instead of those of their mean (an extension of arXiv 2604.07812).

With t the voting tokens, v the visual ones, kv(h) the KV head of query head h:

    raw[t, h, v] = q[t, h] . k[v, kv(h)] / sqrt(d)
    score[v]     = sum_t a[t] sum_h w[h] * normalize_v(raw[t, h, :])[v]           a sums to 1

`query="each"` lets all voters count alike. `query="content"` lets a voter count by how specific it is, the information
that its attention to the visual tokens carries: a[t] ~ log V - sum_h w[h] entropy(softmax_v(raw[t, h, :])).

The normalisation stands inside the sum over voters, so a mean of queries does not do: keys are made, and a row's last
`VOTERS` voters are looked at. All arithmetic is fp32.
"""

import torch
from torch import Tensor

from hawk_compile.kernels.score.reference import combine_heads

VOTERS = 64
"""Most voting tokens of a row that are scored each by itself: the last ones."""


def last_voters(votes: Tensor) -> tuple[Tensor, Tensor]:
    """The last `VOTERS` positions of each row that vote, in order behind the filling.

    Args:
        votes: [B, S] bool.

    Returns:
        positions [B, VOTERS] int64, and which of them vote [B, VOTERS] bool.
    """
    rows, length = votes.shape
    count = votes.long().cumsum(1)
    left = count[:, -1:] - count  # voters behind each position
    slot = torch.where(votes & (left < VOTERS), VOTERS - 1 - left, VOTERS)
    position = torch.arange(length, device=votes.device).expand(rows, length)
    empty = torch.zeros((rows, VOTERS + 1), dtype=torch.int64, device=votes.device)
    return empty.scatter(1, slot, position)[:, :VOTERS], empty.scatter(1, slot, 1)[:, :VOTERS] != 0


def last_vote(votes: Tensor) -> Tensor:
    """[B, S] bool: the last position of each row that votes."""
    count = votes.long().cumsum(1)
    return votes & (count == count[:, -1:])


def score_each(
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, Hkv, S, d]
    visual_mask: Tensor,  # [B, S] bool
    votes: Tensor,  # [B, T] bool
    head_weights: Tensor,  # [H]
    normalization: str,
    specific: bool,
) -> Tensor:
    """Scores [B, S] fp32, 0 at non-visual positions; query and key before RoPE, `specific` weighs the voters."""
    rows, heads, voters, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(rows, kv_heads, -1, head_dim)  # [B, Hkv, G * T, d]
    raw = (grouped @ key.float().transpose(2, 3)).reshape(rows, heads, voters, -1) * head_dim**-0.5
    raw = raw.transpose(1, 2).flatten(0, 1)  # [B * T, H, S]
    visual = visual_mask.unsqueeze(1).expand(-1, voters, -1).flatten(0, 1)  # [B * T, S]
    one_voter = votes.reshape(-1, 1)  # [B * T, 1]
    scores = combine_heads(raw, visual, one_voter, head_weights, normalization).reshape(rows, voters, -1)
    share = votes.float()
    if specific:
        share = share * specificity(raw, visual, head_weights).reshape(rows, voters)
    total = share.sum(1, keepdim=True)
    # Voters without any information between them, as before a single visual token, count alike.
    share = torch.where(total > 0, share, votes.float())
    total = torch.where(total > 0, total, votes.float().sum(1, keepdim=True).clamp_min(1.0))
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
