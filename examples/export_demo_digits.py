"""Write hawk_compile/tools/demo/digits.safetensors: scikit-learn's handwritten digits and which split each belongs to.

    python examples/export_demo_digits.py --out hawk_compile/tools/demo/digits.safetensors

The file is shipped, so that only this script needs scikit-learn. The digits: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

import argparse

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from hawk_compile.tools.demo.scenes import SPLITS

SIZES = {"test": 400, "calibration": 150, "tune": 150}
"""Digits of each split; the rest is for training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="hawk_compile/tools/demo/digits.safetensors")
    digits = load_digits()
    splits = np.full(len(digits.target), SPLITS.index("train"), np.uint8)
    order = np.random.default_rng(0).permutation(len(splits))
    for split, part in zip(SIZES, np.split(order, np.cumsum(list(SIZES.values()))), strict=False):
        splits[part] = SPLITS.index(split)
    save_file(
        {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.uint8), "splits": splits},
        parser.parse_args().out,
        metadata={
            "source": "UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, CC BY 4.0, "
            "as scikit-learn's load_digits gives it"
        },
    )


if __name__ == "__main__":
    main()
