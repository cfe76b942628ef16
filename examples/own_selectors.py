"""Selectors of one's own, compared with those that come with the package on the demo's questions.

    python examples/own_selectors.py [--questions 800] [--split tune]

`likeness` ranks by the cosine of a token's embedding to the mean embedding of the question's words.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import hawk_compile

MODEL = Path(hawk_compile.__file__).parent / "tools" / "demo" / "model"


def likeness(embeddings: Tensor, question_mask: Tensor) -> Tensor:
    words = (embeddings.float() * question_mask.unsqueeze(2)).sum(1, keepdim=True)
    return torch.nn.functional.cosine_similarity(embeddings.float(), words, dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--split", default="tune", choices=["calibration", "tune", "test"])
    given = parser.parse_args()
    found = hawk_compile.evaluate(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32"),
        AutoProcessor.from_pretrained(MODEL),
        f"demo:{given.split}",
        ratios=(0.8, 0.9),
        selectors=("hawk", "hawk_diverse", "cdpruner", likeness),
        baseline="cdpruner",
        limit=given.questions,
        batch=50,
        max_new_tokens=1,
        backend="eager",
    )
    print(found.markdown())


if __name__ == "__main__":
    main()
