#!/bin/sh
# Everything that is measured on a GPU, in under 8 minutes: sh benchmarks/gpu.sh [python]
# The tables of RESULTS.md are what these commands print.
set -u
PYTHON=${1:-python}

$PYTHON -m pytest tests/kernels --quiet
$PYTHON benchmarks/kernels.py
$PYTHON benchmarks/ranking.py --device cuda --dtype bf16 --markdown
$PYTHON -m hawk_compile bench --config qwen2.5-vl-7b --device cuda --dtype bf16 --tokens 576,1024,4096 --markdown
$PYTHON -m hawk_compile bench --config qwen2.5-vl-7b --device cuda --dtype bf16 --tokens 16384 \
    --stages scoring,prefill --markdown
