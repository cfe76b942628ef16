"""Calls of many kinds by several threads on one optimised model, some of which fail; every answer is the one that the
same call gives alone.

    python -m tests.runtime.load --minutes 10 --threads 8 [--architecture qwen2_5_vl] [--backend inductor]
        [--plot FILE] [--control leak|lock|state|answer]

The threads begin together with a model for which nothing is compiled. One call in four is made to fail or is broken off
(`faults.py`); after each the thread must have left nothing behind (`leftovers.py`). It exits 1 if an answer is another
one, an error is not the one that was thrown, something is left behind, a lock is held, or memory grows. With
`--control` something of that kind is done, and it must exit 1.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from tests.runtime.load.run import CONTROLS, Load, plot
from tests.serving.load import STEADY

RESTARTED = "HAWK_LOAD_STEADY"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--architecture", default="qwen2_5_vl")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--prompts", type=int, default=6, help="with images, beside text and batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="a file for the picture of memory over time")
    parser.add_argument("--control", choices=CONTROLS, help="what must make it exit 1")
    given = parser.parse_args()
    if RESTARTED not in os.environ:  # what is freed goes back to the system
        os.execve(sys.executable, [sys.executable, "-m", "tests.runtime.load", *sys.argv[1:]],
                  {**os.environ, **STEADY, RESTARTED: "1"})  # fmt: skip
    torch.set_num_threads(1)
    load = Load(given.architecture, given.backend, given.prompts, given.seed, given.control)
    outcome = load.run(given.threads, 60 * given.minutes)
    print("\n".join(outcome.lines()), flush=True)
    if given.plot:
        plot(outcome, given.plot)
    sys.exit(bool(outcome.wrong()))


if __name__ == "__main__":
    main()
