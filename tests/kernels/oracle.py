"""HAWK's scores and selection written a second time, in fp64 and by loops, and how far fp32 may be from them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


@dataclass
class Expected:
    """Scores [B, S] in fp64, and the error allowed for fp32 arithmetic at each of them."""

    scores: Tensor
    tolerance: Tensor

    def check(self, actual: Tensor) -> None:
        """Raise AssertionError, with the worst positions, if `actual` [B, S] is not fp32 or out of tolerance."""
        assert actual.dtype == torch.float32
        assert actual.shape == self.scores.shape
        excess = (actual.double() - self.scores).abs() - self.tolerance
        wrong = ~(excess <= 0)  # NaN is wrong
        if wrong.any():
            at = wrong.nonzero()[:8].tolist()
            lines = [f"{p}: {actual[*p].item()} instead of {self.scores[*p].item()}" for p in at]
            raise AssertionError(f"{int(wrong.sum())} scores are out of tolerance:\n" + "\n".join(lines))


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
) -> Expected:
    """Project every token, as the paper has it, then score as `score_projected`."""
    heads = len(head_weights)
    head_dim = len(q_weight) // heads

    def project(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:  # [B, H, S, d] and the terms' norms
        weight, x = weight.double(), hidden.double()
        out, square = x @ weight.T, x.square() @ weight.square().T
        if bias is not None:
            out, square = out + bias.double(), square + bias.double().square()
        shape = (*hidden.shape[:2], -1, head_dim)
        return out.view(shape).transpose(1, 2), square.sqrt().view(shape).transpose(1, 2)

    query, query_size = project(q_weight, q_bias)
    key, key_size = project(k_weight, k_bias)
    return _score(
        query, key, query_size, key_size, hidden.shape[2], visual_mask, question_mask, head_weights, normalization
    )


def score_projected(
    query: Tensor, key: Tensor, visual_mask: Tensor, question_mask: Tensor, head_weights: Tensor, normalization: str
) -> Expected:
    q, k = query.double(), key.double()
    return _score(q, k, q.abs(), k.abs(), 1, visual_mask, question_mask, head_weights, normalization)


def _score(
    query: Tensor,  # [B, H, S, d]
    key: Tensor,  # [B, Hkv, S, d]
    query_size: Tensor,  # the norm of the terms whose sum each is
    key_size: Tensor,
    width: int,  # how many those are
    visual_mask: Tensor,
    question_mask: Tensor,
    head_weights: Tensor,
    normalization: str,
) -> Expected:
    batch, heads, size, head_dim = query.shape
    group = heads // key.shape[1]
    scores = torch.zeros(batch, size, dtype=torch.float64)
    variance = torch.zeros_like(scores)
    for b in range(batch):
        visual = visual_mask[b].nonzero().flatten()
        voters = [(t, float(question_mask[b, t])) for t in range(size) if question_mask[b, t] > 0]
        total = sum(vote for _, vote in voters)
        if not voters or not len(visual):
            continue
        for h in range(heads):
            mean = torch.stack([vote / total * query[b, h, t] for t, vote in voters]).sum(0)
            mean_size = torch.stack([vote / total * query_size[b, h, t] for t, vote in voters]).sum(0)
            k, k_size = key[b, h // group, visual], key_size[b, h // group, visual]
            raw = (k @ mean) / math.sqrt(head_dim)
            raw = torch.where(raw.isfinite(), raw, 0.0)
            # The partial sums of n terms of random signs are at most about as large as the norm of the terms, and each
            # is off by half an epsilon: n such errors of random signs make sqrt(n) * eps / 2 of that norm.
            terms = max(len(voters), width, head_dim)
            norm = (k_size.square() @ mean_size.square()).sqrt() / math.sqrt(head_dim)
            error = torch.where(norm.isfinite(), norm, 0.0) * math.sqrt(terms) * EPSILON / 2
            share, share_error = _normalize(raw, error, normalization)
            weight = float(head_weights[h])
            scores[b, visual] += weight * share
            variance[b, visual] += (weight * (share_error + EPSILON * share.abs())).square()
    # Heads err independently. The largest of thousands of such errors is about four times the usual one.
    return Expected(scores, 4 * variance.sqrt())


def _normalize(raw: Tensor, error: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    """A head's normalised scores [V], and the first-order effect of the errors of its raw scores."""
    worst = error.max()
    if normalization == "l2":
        norm = raw.norm().clamp_min(1e-12)
        return raw / norm, (error + raw.abs() * error.norm() / norm) / norm
    if normalization == "softmax":
        share = raw.softmax(0)
        # exp of fp32: an argument x is known to eps * |x|, so that the result is off by that share of itself.
        return share, share * (2 * worst + EPSILON * (raw.max() - raw.min() + 1))
    span = (raw.max() - raw.min()).clamp_min(1e-12)
    if raw.max() == raw.min():
        return torch.zeros_like(raw), torch.zeros_like(raw)  # 0 / floor, exactly
    return (raw - raw.min()) / span, 2 * worst / span


def select(
    scores: Tensor, visual_mask: Tensor, token_mask: Tensor, budget: Tensor, length: int
) -> tuple[list[list[int]], list[list[bool]]]:
    """The rule of `hawk::select`, by sorted lists."""
    keeps, valids = [], []
    for b in range(scores.shape[0]):
        values = [0.0 if math.isnan(v) else v for v in scores[b].tolist()]
        visual, token = visual_mask[b].tolist(), token_mask[b].tolist()
        everything = range(len(values))
        candidates = sorted((s for s in everything if visual[s] and token[s]), key=lambda s: (-values[s], s))
        best = set(candidates[: max(0, int(budget[b]))])
        text = [s for s in everything if token[s] and not visual[s]]
        wanted = {*text, *best}
        padding = [s for s in everything if not token[s]][: max(0, length - len(wanted))]
        kept = sorted([*wanted, *padding])
        filling = [min(text, default=0)] * (length - len(kept))
        keeps.append([*filling, *kept])
        valids.append([False] * len(filling) + [s in wanted for s in kept])
    return keeps, valids
