"""Selectors of one's own, compared with those that come with the package on the demo's questions.

    python examples/own_selectors.py [--questions 800] [--split tune]

`likeness` ranks by the cosine of a token's embedding to the mean embedding of the question's words; `likeness_diverse`
weighs that and the HAWK score, against what is kept already, by the rule of CDPruner.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import hawk_compile

MODEL = Path(hawk_compile.__file__).parent / "demo" / "model"


def likeness(embeddings: Tensor, votes: Tensor) -> Tensor:
    words = (embeddings.float() * votes.unsqueeze(2)).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(embeddings.float(), words, dim=2)


def in_unit_range(values: Tensor, mask: Tensor) -> Tensor:
    """Values [B, S] scaled to [0, 1] over the masked ones of each row."""
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def likeness_diverse(
    embeddings: Tensor, scores: Tensor, visual_mask: Tensor, votes: Tensor, budget: Tensor, *, share: float = 0.5
) -> Tensor:
    like = in_unit_range(likeness(embeddings, votes), visual_mask)
    relevance = like**share * in_unit_range(scores, visual_mask) ** (1 - share)
    return torch.ops.hawk.greedy_order(embeddings, relevance, visual_mask, budget, "dpp", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--split", default="tune", choices=["calibration", "tune", "test"])
    given = parser.parse_args()
    hawk_compile.register_selector("likeness", likeness)
    hawk_compile.register_selector("likeness_diverse", likeness_diverse, portable=False)
    found = hawk_compile.evaluate(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32"),
        AutoProcessor.from_pretrained(MODEL),
        f"demo:{given.split}",
        ratios=(0.8, 0.9),
        selectors=("hawk", "hawk_diverse", "cdpruner", "likeness", "likeness_diverse"),
        baseline="cdpruner",
        limit=given.questions,
        batch=50,
        max_new_tokens=1,
        backend="eager",
    )
    print(found.markdown())


if __name__ == "__main__":
    main()
