"""Drawn conversations, served by an engine and held to `optimize`: ids and log-probabilities.

    python -m tests.serving.fuzz --prompts 300 --seed 0        in the environment of `make test-vllm`

Each round makes an engine of another tiny checkpoint, and sends conversations in batches, each with ratios of its own.
A draw is a seed and a number: what differs is printed with both, and `--only NUMBER` sends that batch alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

from PIL import Image

from hawk_compile.tools.demo.scenes import pick_questions
from tests.serving.by_hand import TILED, expected
from tests.serving.cases import SIZES, Conversation, Part
from tests.serving.checkpoints import KINDS
from tests.serving.engine import engine, farthest, served
from tests.serving.other_checkpoints import OTHER_KINDS

CLOSE = 1e-4
BATCH = 8
RATIOS = (0.0, 0.3, 0.5, 0.8, 0.9, 0.95)
CHECKPOINTS = {name: make for name, make in {**KINDS, **OTHER_KINDS}.items() if name in (
    "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "mistral3")}  # fmt: skip
ALONE = ("llava",)
"""Nothing stands around an image's tokens, so that two of them may not touch."""
SCENES = 24


def conversation(draw: random.Random, name: str) -> Conversation:
    """One to three turns with at most two pictures in all, some without text, or with text in front of them; but for
    checkpoints that cut pictures into tiles, of which `by_hand` knows text behind them."""
    alone, tiled = name in ALONE, name in TILED
    pairs = pick_questions("test", SCENES)
    left, turns = 2, []
    for number in range(draw.choice((1, 1, 1, 2, 3))):
        pictures = draw.randint(0 if number else 1, min(left, 1 if alone else 2))
        left -= pictures
        parts: list[Part] = [picture(draw) for _ in range(pictures)]
        if draw.random() < 0.9 or not pictures or tiled:
            place = len(parts) if draw.random() < 0.7 or tiled else 0
            parts.insert(place, draw.choice(pairs)[1].text)
        turns.append(parts)
    return Conversation(turns)


def picture(draw: random.Random) -> Image.Image:
    scene = draw.choice(pick_questions("test", SCENES))[0].pil()
    return scene.resize(draw.choice(SIZES)) if draw.random() < 0.6 else scene


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="this one alone")
    parser.add_argument("--only", type=int, help="this batch alone")
    parser.add_argument("--control", action="store_true", help="serve with another ratio, which must be found")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [given.checkpoint] if given.checkpoint else list(CHECKPOINTS)
    batches, each = 0, -(-given.prompts // (BATCH * len(names)))
    wrong, largest, began = [], 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        for place, name in enumerate(names):
            folder = CHECKPOINTS[name](Path(made) / name)
            llm = engine(folder, {"ratio": 0.8}, max_model_len=2048, limit_mm_per_prompt={"image": 2})
            for number in range(each):
                if given.only not in (None, number):
                    continue
                draw = random.Random(f"{given.seed} {name} {number}")
                ratio = draw.choice(RATIOS)
                asked = [conversation(draw, name) for _ in range(BATCH)]
                answers = served(llm, folder, asked, 0.6 if given.control else ratio)
                difference = farthest(answers, expected(folder, asked, answers, ratio))
                batches, largest = batches + 1, max(largest, difference)
                if difference >= CLOSE:
                    wrong.append(f"--seed {given.seed} --checkpoint {name} --only {number}: {difference:.2g}")
                    print("FOUND", wrong[-1], flush=True)
            del llm
            print(f"{place + 1} of {len(names)}: {name}, {batches * BATCH} prompts", flush=True)
    seconds = time.monotonic() - began
    print(f"{batches * BATCH} prompts of {len(names)} checkpoints in {seconds:.0f} s; {len(wrong)} batches are wrong")
    print(f"log-probabilities differ by at most {largest:.2g}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
