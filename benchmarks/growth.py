"""How time and memory of a pruned prefill grow with visual tokens, rows and question, beside what theory lets them.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--out benchmarks] [--rounds 3] [--along visual rows question]

A decoder of 2 layers of width 128 behind an encoded image; eager, so that nothing waits for a compiler. One of three
sizes grows, the others stay. Theory, in FLOPs: projections and feed-forward layers 2 P S', causal attention 2 S'^2 H d
in a layer, the score 2 S D H; in bytes: a few copies of the prompt, S D, and of what is kept. Slopes are those of the
last step of each curve in logarithms: 1 is in proportion, 2 is quadratic. What grows faster than theory is told of.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hawk_compile
from hawk_compile.capture.features import fresh
from hawk_compile.tools.benchmarking.memory import peak_bytes
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.profiles import tiny
from hawk_compile.tools.benchmarking.timing import Call, in_turns
from hawk_compile.tools.environment import measured_on

CPU = torch.device("cpu")
RATIO = 0.9
SIZES = {
    "visual": [(visual, 1, 64) for visual in (256, 1024, 4096, 16384, 65536)],
    "rows": [(256, rows, 64) for rows in (1, 4, 16, 64)],
    "question": [(1024, 1, question) for question in (8, 32, 128, 512, 2048)],
}
"""What grows -> (visual tokens, rows, question's tokens)."""
SLACK = 0.25
"""By how much a slope may be above theory's before it is told of."""


@dataclass(frozen=True)
class Point:
    """One prompt: what grows, and seconds, bytes above what was in use, FLOPs and bytes by theory."""

    size: int
    seconds: float
    peak: int
    flops: float
    bytes: float


def arguments(model: Any, visual: int, rows: int, question: int) -> dict[str, Any]:
    """A forward's arguments: an image of random features, and a question behind it."""
    config = model.config
    words = torch.randint(8, 512, (question,), generator=torch.Generator().manual_seed(question))
    row = [config.vision_start_token_id, *[config.image_token_id] * visual, config.vision_end_token_id, *words.tolist()]
    ids = torch.tensor([row] * rows)
    features = [torch.randn(visual, config.get_text_config().hidden_size) for _ in range(rows)]
    return {
        "input_ids": ids,
        "position_ids": torch.arange(len(row)).expand(3, rows, -1),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
        "logits_to_keep": 1,
    }


def theory(model: Any, visual: int, rows: int, question: int) -> tuple[float, float]:
    """(FLOPs, bytes) of a pruned prefill."""
    text = model.config.get_text_config()
    width, heads, layers = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    before = visual + question + 2
    after = before - visual + hawk_compile.HawkConfig(ratio=RATIO).kept(visual)
    weights = sum(each.numel() for each in model.get_decoder().layers.parameters())
    flops = rows * (2 * weights * after + 2 * layers * after**2 * width + 2 * before * width * heads)
    widest = text.intermediate_size
    return flops, 4 * rows * (2 * before * width + after * (3 * widest + 4 * width))


@torch.no_grad()
def measure(model: Any, sizes: tuple[int, int, int], grows: str, rounds: int) -> Point:
    given = arguments(model, *sizes)
    call = Call("hawk", RATIO, lambda: lambda: model(**fresh(given)))
    in_turns([call], 1, CPU)
    spent = in_turns([call], rounds, CPU)[0]
    peak, _ = peak_bytes(lambda: model(**fresh(given)), CPU)
    number = sizes[list(SIZES).index(grows)]
    return Point(number, statistics.median(spent), peak or 0, *theory(model, *sizes))


def slope(points: list[Point], name: str) -> float:
    """Of the last step, in logarithms."""
    low, high = (getattr(each, name) for each in points[-2:])
    return math.log(max(high, 1e-9) / max(low, 1e-9)) / math.log(points[-1].size / points[-2].size)


def draw(points: list[Point], grows: str, path: Path) -> None:
    """Both curves and theory's, which goes through the last point: it says how steep a curve may be."""
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.4))
    sizes = [each.size for each in points]
    for axis, (name, by, label, unit) in zip(both, (("seconds", "flops", "ms", 1e3), ("peak", "bytes", "MiB", 2**-20)),
                                             strict=True):  # fmt: skip
        last = points[-1]
        scale = getattr(last, name) / getattr(last, by) * unit
        axis.loglog(sizes, [getattr(each, name) * unit for each in points], "o-", label="measured")
        axis.loglog(sizes, [getattr(each, by) * scale for each in points], "--", label=f"theory's slope ({by})")
        axis.set_xlabel(grows)
        axis.set_ylabel(label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--along", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--largest", type=int, default=2**20, help="leave out larger sizes")
    given = parser.parse_args()
    model = hawk_compile.optimize(load(tiny(), CPU, torch.float32, None, False)[0], ratio=RATIO, backend="eager")
    print(f"{measured_on('cpu')}\n")
    print("| grows | size | ms | peak MiB | slope of time | theory | slope of memory | theory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for grows in given.along:
        points: list[Point] = []
        for sizes in SIZES[grows]:
            if sizes[list(SIZES).index(grows)] > given.largest:
                continue
            points.append(measure(model, sizes, grows, given.rounds))
            last = points[-1]
            names = ("seconds", "flops", "peak", "bytes")
            slopes = [slope(points, name) for name in names] if len(points) > 1 else []
            cells = [grows, f"{last.size:,}", f"{1e3 * last.seconds:.1f}", f"{last.peak / 2**20:.1f}",
                     *(f"{each:.2f}" for each in slopes)]  # fmt: skip
            print(f"| {' | '.join([*cells, *[''] * (8 - len(cells))])} |", flush=True)
        for name, by in (("seconds", "flops"), ("peak", "bytes")):
            if slope(points, name) > slope(points, by) + SLACK:
                print(f"\n{grows}: {name} grows faster than theory at the end\n")
        draw(points, grows, given.out / f"growth_{grows}.svg")


if __name__ == "__main__":
    main()
