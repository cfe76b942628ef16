"""What each selector costs: scoring (where it reads the score), ranking and selection of one prompt.

    python benchmarks/ranking.py [--device cuda --dtype bf16] [--visual 1024 4096 16384] [--width 3584] [--markdown]
    python benchmarks/ranking.py --definition --selectors cdpruner divprune idpruner hawk_diverse

The shape is that of a 7B decoder (width 3,584, 28 query heads of 128 over 4 KV heads), one prompt with one image and 64
text tokens on either side, 80 % of the visual tokens removed. Operators run one by one, as without a compiler: what
Inductor fuses is cheaper than here. Medians; on a GPU by its own events.

`--definition` times each selector a second time, in turns, with greedy orders as `kernels/greedy/reference.py` writes
them down, and says whether both keep the same tokens. On a CPU alone.
"""

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hawk_compile
from hawk_compile.kernels.gather import op as gather_op  # noqa: F401  these register the operators
from hawk_compile.kernels.greedy import lazy, reference
from hawk_compile.kernels.score import op as score_op  # noqa: F401
from hawk_compile.kernels.score.by_token import last_of_question, score_each, split_heads
from hawk_compile.kernels.select import op as select_op  # noqa: F401
from hawk_compile.passes.insert_ranking import READABLE
from hawk_compile.settings.selectors import SELECTORS
from hawk_compile.tools.checkpoints import DTYPES
from hawk_compile.tools.environment import measured_on

HEADS, KV_HEADS, HEAD_DIM, TEXT = 28, 4, 128, 64
RATIO = 0.8


def prompt(visual: int, width: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What rankings read, but for the score."""
    generator = torch.Generator(device).manual_seed(0)
    size = TEXT + visual + TEXT
    position = torch.arange(size, device=device).unsqueeze(0)
    question_mask = position >= TEXT + visual
    return {
        "embeddings": torch.randn(1, size, width, generator=generator, device=device).to(dtype),
        "visual_mask": (position >= TEXT) & ~question_mask,
        "question_mask": question_mask,
        "budget": torch.tensor([hawk_compile.HawkConfig(ratio=RATIO).kept(visual)], device=device),
    }


def call(name: str, given: dict[str, Tensor], weights: list[Any]) -> Callable[[], Any]:
    """A selector on a prompt, from embeddings to kept positions."""
    selector, ranking = SELECTORS[name], SELECTORS[name].ranking
    wanted = inspect.signature(ranking).parameters.keys() & READABLE.keys() if ranking else {"scores"}
    length = 2 * TEXT + int(given["budget"])
    everything = torch.ones_like(given["visual_mask"])

    def run() -> Any:
        known = dict(given)
        if "scores" in wanted:
            states = (given["embeddings"], given["visual_mask"], given["question_mask"])
            score = scored_each if selector.query in ("each", "content") else torch.ops.hawk.score_folded
            known["scores"] = score(*states, *weights, selector.normalization)
        order = known["scores"] if ranking is None else ranking(**{each: known[each] for each in wanted})
        return torch.ops.hawk.select(order, given["visual_mask"], everything, given["budget"], length)

    return run


def scored_each(
    hidden: Tensor, visual_mask: Tensor, question_mask: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, head_weights: Tensor, normalization: str,
) -> Tensor:  # fmt: skip
    """What the pass puts in where every voter is scored by itself."""
    positions, real = last_of_question(question_mask)
    query = split_heads(torch.ops.hawk.gather(hidden, positions), q_weight, q_bias, HEAD_DIM)
    key = split_heads(hidden, k_weight, k_bias, HEAD_DIM)
    return score_each(query, key, visual_mask, real, head_weights, normalization, False)


def by_definition(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with greedy orders as the reference computes them."""

    def plain() -> Any:
        with mock.patch.object(lazy, "greedy_order", reference.greedy_order):
            return run()

    return plain


def milliseconds(runs: list[Callable[[], Any]], device: str, rounds: int) -> tuple[list[float], list[Any]]:
    """(medians, what was returned) of calls that are timed in turns."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return [float(do_bench(run, return_mode="median")) for run in runs], [run() for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    results: list[Any] = [None for _ in runs]
    for _ in range(rounds):
        for number, run in enumerate(runs):
            started = time.perf_counter()
            results[number] = run()
            times[number].append(1e3 * (time.perf_counter() - started))
    return [statistics.median(each) for each in times], results


def same_kept(results: list[Any]) -> int:
    """Positions that all of them keep."""
    kept = [set(keep.flatten().tolist()) for keep, _ in results]
    return len(set.intersection(*kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--visual", type=int, nargs="+", default=(1024, 4096, 16384))
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--definition", action="store_true", help="time greedy orders by their definition too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="lines for benchmarks/RESULTS.md")
    given = parser.parse_args()
    dtype = DTYPES[given.dtype]

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=given.device) * given.width**-0.5).to(dtype)

    head_weights = torch.full((HEADS,), 1 / HEADS, device=given.device)
    rows = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    weights = [each for count in rows for each in (draw(count, given.width), draw(count))] + [head_weights]
    cells: dict[str, list[str]] = {name: [] for name in given.selectors}
    with torch.no_grad():
        for visual in given.visual:
            inputs = prompt(visual, given.width, given.device, dtype)
            for name, row in cells.items():
                run = call(name, inputs, weights)
                runs = [run, by_definition(run)] if given.definition else [run]
                times, results = milliseconds(runs, given.device, given.rounds)
                row += [f"{each:,.3f}" if given.device.startswith("cuda") else f"{each:,.1f}" for each in times]
                if given.definition:
                    kept = f"{same_kept(results)} / {results[0][0].numel()}"
                    row[-2:] = [f"{times[0] / times[1]:.3f}", *row[-2:], kept]
                print(f"{visual} visual tokens, {name}: done", file=sys.stderr)
    print(f"{measured_on(given.device)}\n\n`python {' '.join(sys.argv)}`\n")
    heads = ["ratio", "now, ms", "by definition, ms", "kept by both"] if given.definition else ["ms"]
    lines = [("selector", *(f"V = {visual:,}: {head}" for visual in given.visual for head in heads))]
    lines += [(name, *row) for name, row in cells.items()]
    if given.markdown:
        lines.insert(1, ("---", *("---:" for _ in lines[0][1:])))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    for line in lines:
        print(line[0].ljust(12), *(cell.rjust(max(18, len(lines[0][at]))) for at, cell in enumerate(line[1:], 1)))


if __name__ == "__main__":
    main()
