"""What padding costs the pruned prefill: a batch of equal rows, whose attention is causal without a mask, against the
same batch with some padding in its first row, whose attention reads a mask of [B, 1, S', S'].

    python benchmarks/padding.py [--config small] [--tokens 1024] [--batch 4] [--device cuda --dtype bf16]

In turns, in one process; ratios round by round, medians. The kernel is the one that PyTorch's profiler sees.
"""

import argparse
import statistics
from typing import Any

import torch

import hawk_compile
from hawk_compile.capture.features import fresh
from hawk_compile.tools.benchmarking import prompts, timing
from hawk_compile.tools.benchmarking.images import picture
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.checkpoints import DTYPES
from hawk_compile.tools.environment import measured_on

RATIOS, PADDING, TEXT, ROUNDS = (0.5, 0.8, 0.9), 8, 64, 9


def kernel_of(call: Any) -> str:
    """The attention operator with the most calls."""
    with torch.profiler.profile() as seen:
        call()
    found = [each for each in seen.key_averages() if "attention" in each.key and "_scaled" in each.key]
    return max(found, key=lambda each: each.count).key.removeprefix("aten::")


@torch.no_grad()
def measure(model: Any, given: dict[str, Any], ratio: float, device: torch.device) -> str:
    """A line of the table."""
    hawk_compile.optimize(model, ratio=ratio, head_weights="uniform")
    mask = torch.ones_like(given["input_ids"])
    mask[0, :PADDING] = 0
    forms = {
        "causal": lambda: model(**fresh(given)),
        "masked": lambda: model(**fresh({**given, "attention_mask": mask})),
    }
    calls = [timing.Call(name, ratio, lambda form=form: form) for name, form in forms.items()]
    for call in calls:
        timing.seconds(call, device)
    causal, masked = timing.in_turns(calls, ROUNDS, device)
    rows, length = mask.shape[0], hawk_compile.report(model).kept_tokens
    ratios = [slow / fast for slow, fast in zip(masked, causal, strict=True)]
    kernels = " / ".join(kernel_of(form) for form in forms.values())
    return (
        f"| {ratio:g} | {length} | {statistics.median(ratios):.3f} | {1e3 * statistics.median(causal):.1f} | "
        f"{1e3 * statistics.median(masked):.1f} | {rows * length**2 / 1e6:.2f} | {kernels} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    options = parser.parse_args()
    device = torch.device(options.device)
    model: Any = load(options.config, device, DTYPES[options.dtype], None, False)[0]
    prompt = prompts.make(model, picture(model.config, options.tokens), TEXT, options.batch, device)
    print(measured_on(options.device))
    print("| removed | S' | masked / causal | causal ms | masked ms | mask MB | kernels |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for ratio in RATIOS:
        print(measure(model, prompts.encode(model, prompt), ratio, device), flush=True)


if __name__ == "__main__":
    main()
