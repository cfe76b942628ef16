"""Selectors on the demo model with its decoder quantised, as a model is that runs in integers.

    python benchmarks/quantized.py [--bits 8 4 --questions 2000 --batch 50]

Simulated in fp32: each linear layer of the decoder rounds its weights, once, and what it reads, at every call, to the
nearest of levels on either side of 0: weights with a scale for each output channel (8 bits) or for 32 input channels of
it (below 8), what is read with a scale for each token. The vision encoder, embeddings, attention's products and the
output head, which shares its weights with the embeddings, stay in fp32. Scores are made by the quantised query and key
projections. Prefill times are those of the simulation.

QAPruner is asked with `bits` as the decoder has them and as the other row has them; all else as it is by default.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

import hawk_compile
from hawk_compile import selectors
from hawk_compile.tools.checkpoints import read_checkpoint
from hawk_compile.tools.environment import measured_on
from hawk_compile.tools.evaluation.demo import MODEL

RATIOS = (0.5, 0.8, 0.9)
GROUP = 32
"""Input channels of a weight that share a scale, below 8 bits."""
METHODS: dict[str, dict[str, Any]] = {
    "hawk": {},
    "uniform": {"selector": "uniform"},
    "qapruner, bits 8": {"selector": selectors.QAPruner(bits=8)},
    "qapruner, bits 4": {"selector": selectors.QAPruner(bits=4)},
}


class QuantizedLinear(nn.Module):
    """A linear layer [.., D] -> [.., O] whose weight [O, D] and input are rounded to `bits`."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.bias = bits, linear.bias
        weight = linear.weight.detach()
        weight = rounded(weight.unflatten(1, (-1, GROUP)), bits).flatten(1) if bits < 8 else rounded(weight, bits)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded(x, self.bits), self.weight, self.bias)


def rounded(values: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits - 1 levels, equally far apart; a scale for each row of the last axis."""
    levels = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
    return (values / scale).round() * scale


def quantize(model: Any, bits: int) -> int:
    """Replace the decoder's linear layers; how many there are."""
    decoder = model.base_model.get_decoder()
    found = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    for name, module in found:
        decoder.set_submodule(name, QuantizedLinear(module, bits))
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=(8, 4))
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=50)
    given = parser.parse_args()
    print(f"{measured_on('cpu')}\n\n`python {' '.join(sys.argv)}`")

    def progress(now: hawk_compile.Progress) -> None:
        print(f"{now.done} of {now.total} {now.text}", file=sys.stderr)

    for bits in given.bits:
        model, processor = read_checkpoint(MODEL, torch.float32)
        count = quantize(model, bits)
        found = hawk_compile.evaluate(
            model, processor, "demo", ratios=RATIOS, selectors=METHODS, limit=given.questions, batch=given.batch,
            max_new_tokens=1, backend="eager", progress=progress,
        )  # fmt: skip
        print(f"\n{bits} bits, {count} linear layers\n\n{found.markdown()}", flush=True)


if __name__ == "__main__":
    main()
