"""Budgets by share of the score, beside fixed ones, on the demo's questions.

    python examples/adaptive_budget.py [--questions 800] [--split tune]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import hawk_compile

MODEL = Path(hawk_compile.__file__).parent / "tools" / "demo" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--split", default="tune", choices=["calibration", "tune", "test"])
    given = parser.parse_args()
    adaptive = {f"mass {mass}": {"budget": hawk_compile.Adaptive(mass, max=1.0)} for mass in (0.3, 0.5, 0.7, 0.9)}
    found = hawk_compile.evaluate(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32"),
        AutoProcessor.from_pretrained(MODEL),
        f"demo:{given.split}",
        ratios=(0.5, 0.7, 0.8, 0.9),  # of the fixed budget: `max` overrules them in the others
        selectors={"fixed": {}, **adaptive},
        baseline="fixed",
        selector="hawk_each",
        limit=given.questions,
        batch=50,
        max_new_tokens=1,
        backend="eager",
    )
    print(found.markdown())


if __name__ == "__main__":
    main()
