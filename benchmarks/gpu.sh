#!/bin/sh
# Everything that is measured on a GPU, in under 8 minutes: sh benchmarks/gpu.sh [python]
# The tables of RESULTS.md are what these commands print.
set -u
PYTHON=${1:-python}

$PYTHON -m pytest tests/kernels --quiet
$PYTHON benchmarks/kernels.py
$PYTHON benchmarks/ranking.py --device cuda --dtype bfloat16 --markdown
$PYTHON benchmarks/prefill.py --device cuda --dtype bfloat16 --layers 8 --width 3584 --sides 24 32 64 128 --markdown
