"""Memory of a GPU that runs out at one point after another: after each call that fails, the same model answers right.

    python -m tests.runtime.load.out_of_memory [--architecture llava] [--backend inductor] [--steps 60]

The allocator is given a little more each time, from nothing to what the call needs; what it raises is real. cuDNN is
left out: once it had no memory for a convolution it takes another algorithm, and keeps it, whose features differ.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import hawk_compile
from tests import zoo
from tests.runtime.load.leftovers import held, left_in_thread
from tests.runtime.load.run import RATIO

ROWS = 512
CLOSE = 2e-4
"""Logits of magnitude 10, in fp32, by products of other shapes."""
PLACES = {"get_image_features": "encoder", "fill_cache": "hand-over", "run_graph": "prefill", "step": "step"}
"""Functions -> the part of a call that they stand for, innermost first."""


@torch.no_grad()
def ask(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def place(error: BaseException) -> str:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((part for name, part in PLACES.items() if name in names), Path(names[-1]).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llava")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.enabled = False
    total = torch.cuda.get_device_properties(0).total_memory
    model = zoo.build(given.architecture, layers=2).cuda()
    inputs = zoo.inputs(given.architecture, model, rows=[zoo.sizes(given.architecture)[2]] * ROWS)
    hawk_compile.optimize(model, ratio=RATIO, backend=given.backend, compile_decode=True)
    alone = ask(model, inputs)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    ask(model, inputs)
    needed = torch.cuda.max_memory_reserved() - before
    came, wrong = Counter[str](), []
    for step in range(given.steps):
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + needed * (step + 1) // given.steps
        torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            ask(model, inputs)
            came["enough"] += 1
        except torch.OutOfMemoryError as error:
            came[place(error)] += 1
        torch.cuda.set_per_process_memory_fraction(1.0)
        now = ask(model, inputs)
        distance = max(float((a - b).abs().max()) for a, b in zip(now.logits, alone.logits, strict=True))
        left = left_in_thread(model) + held(model)
        if left or distance > CLOSE or not torch.equal(now.sequences, alone.sequences):
            wrong.append(f"step {step}: {distance:.1e} from the answer before, left {left}")
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {needed / 2**20:.0f} MiB needed; {dict(came)}")
    print(f"reserved after: {torch.cuda.memory_reserved() - before:+d} bytes; wrong: {len(wrong)}", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
