"""Rankings: functions that say which visual tokens of a prompt are kept; every row keeps its best.

A ranking is a function of tensors, [B, S] float: the visual tokens with the highest values are kept, ties in favour of
the lower position, and what stands elsewhere does not matter. It reads what its parameters name:

    scores         [B, S] float32: the HAWK score of every visual token, 0 elsewhere
    embeddings     [B, S, D]: the prompt at the decoder's input, visual features among the token embeddings
    visual_mask    [B, S] bool: real visual tokens
    question_mask  [B, S] bool: the question, whose text votes; `votes` in former releases
    budget         [B] int64: visual tokens that each row keeps

Parameters with a default are options: numbers, text or flags, part of the compiled graph. A ranking runs inside that
graph, so it is traced: tensor code without shapes that depend on data. Sources and definitions of the methods:
docs/selectors.md.
"""

import torch
from torch import Tensor

import hawk_compile.kernels.greedy.op  # noqa: F401  registers the operator
from hawk_compile.kernels.greedy.reference import unit_range


def divprune(embeddings: Tensor, visual_mask: Tensor, budget: Tensor) -> Tensor:
    importance = torch.zeros_like(visual_mask, dtype=torch.float32)
    return torch.ops.hawk.greedy_order(embeddings, importance, visual_mask, budget, "max_min", 0.0)


def idpruner(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, budget: Tensor, *, importance: float = 0.5
) -> Tensor:
    return torch.ops.hawk.greedy_order(embeddings, scores, visual_mask, budget, "mmr", importance)


def cdpruner(embeddings: Tensor, visual_mask: Tensor, question_mask: Tensor, budget: Tensor) -> Tensor:
    """Relevance is the likeness to the text; the paper takes it from CLIP's text encoder."""
    relevance = likeness_to_question(embeddings, question_mask)
    return torch.ops.hawk.greedy_order(embeddings, relevance, visual_mask, budget, "dpp", 0.0)


def likeness_to_question(embeddings: Tensor, question_mask: Tensor) -> Tensor:
    """[B, S]: the cosine of every token to the question's mean embedding."""
    text = (embeddings.float() * question_mask.unsqueeze(2)).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(embeddings.float(), text, dim=2)


def hawk_diverse(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, question_mask: Tensor, budget: Tensor, *,
    likeness: float = 0.5,
) -> Tensor:  # fmt: skip
    """The weighted geometric mean of the HAWK score and the likeness to the text, both in [0, 1], as relevance against
    what is kept already."""
    score, like = (unit_range(each, visual_mask) for each in (scores, likeness_to_question(embeddings, question_mask)))
    relevance = score ** (1 - likeness) * like**likeness
    return torch.ops.hawk.greedy_order(embeddings, relevance, visual_mask, budget, "dpp", 0.0)


def dart(embeddings: Tensor, visual_mask: Tensor, question_mask: Tensor, *, pivots: int = 4) -> Tensor:
    """Pivots are the visual and the question's tokens of the largest L1 norm; what resembles them least is kept."""
    size = embeddings.float().abs().sum(2)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    found = []
    for mask in (visual_mask, question_mask):
        left = size.masked_fill(~mask, -1.0)
        for _ in range(pivots):  # no sort, which not every runtime has, nor for prompts of any length
            found.append(left.max(1, keepdim=True))
            left = left.scatter(1, found[-1].indices, -1.0)
    largest, chosen = torch.cat([each.values for each in found], 1), torch.cat([each.indices for each in found], 1)
    similar = unit @ unit.gather(1, chosen.unsqueeze(2).expand(-1, -1, unit.shape[2])).transpose(1, 2)
    similar = similar.masked_fill((largest < 0).unsqueeze(1), -1.0)  # fewer tokens than pivots
    itself = torch.zeros_like(size).scatter(1, chosen[:, :pivots], 1.0)
    return 2 * itself - similar.amax(2)


def qapruner(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, *, bits: int = 4, group: int = 32,
    error_weight: float = 0.25, outlier_weight: float = 0.25,
) -> Tensor:  # fmt: skip
    """The HAWK score, raised where quantisation in groups of channels changes a token much, and for outliers."""
    values = embeddings.float()
    grouped = values.unflatten(2, (-1, group))
    largest = grouped.abs().amax(3, keepdim=True).clamp_min(1e-12)
    levels = 2 ** (bits - 1) - 1
    rounded = (grouped / largest * levels).round() / levels * largest
    error = (grouped - rounded).flatten(2).norm(dim=2) / values.norm(dim=2).clamp_min(1e-12)
    outlier = values.abs().amax(2) / values.abs().mean(2).clamp_min(1e-12)
    relevance, error, outlier = (unit_range(each, visual_mask) for each in (scores, error, outlier))
    return relevance + error_weight * error + outlier_weight * outlier


def norm(embeddings: Tensor) -> Tensor:
    """How long a token's embedding is: a control that looks at no question and at no other token."""
    return embeddings.float().norm(dim=2)


def random(embeddings: Tensor, visual_mask: Tensor, *, seed: int = 0) -> Tensor:
    """Noise that is the same for the same prompt and seed, whatever pads it: a hash of each token's number among the
    visual ones and of its first channel, of which rounding in batches of another size changes the last bits only."""
    rank = visual_mask.long().cumsum(1)
    bits = embeddings[..., 0].float().view(torch.int32).long() + 2**11 >> 12
    mixed = bits * 2654435761 + (rank + seed * 1_000_003) * 40503
    mixed = (mixed ^ mixed << 13) & 0xFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 7) & 0xFFFFFFFFFFFF
    mixed = (mixed ^ mixed << 17) & 0xFFFFFFFFFFFF
    return (mixed & 0xFFFFFF).float()


def stride(visual_mask: Tensor, budget: Tensor) -> Tensor:
    """Visual tokens at equal distances."""
    rank = visual_mask.long().cumsum(1)
    total = rank[:, -1:].clamp_min(1)
    kept = budget.unsqueeze(1)
    return ((rank * kept) // total > ((rank - 1) * kept) // total).float()
