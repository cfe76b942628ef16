#!/bin/sh
# Everything that is measured on a GPU, in at most 9 minutes: sh benchmarks/gpu.sh [python]
# The tables of RESULTS.md are what these commands print. Each has a limit of its own, so that one that hangs or is slow
# to compile leaves the others their time; its name is printed if it failed.
set -u
PYTHON=${1:-python}
export TRANSFORMERS_DISABLE_TORCH_CHECK=1  # torch 2.11, which some such machines have, is older than transformers asks for

limited() {
    seconds=$1
    shift
    timeout "$seconds" "$@" || echo "failed or over $seconds s: $*"
}

limited 120 "$PYTHON" -m pytest tests/kernels --quiet
limited 40 "$PYTHON" benchmarks/kernels.py
limited 60 "$PYTHON" benchmarks/ranking.py --device cuda --dtype bf16 --markdown
limited 140 "$PYTHON" -m hawk_compile bench --config qwen2.5-vl-7b --device cuda --dtype bf16 \
    --tokens 576,1024,4096 --markdown
limited 70 "$PYTHON" -m hawk_compile bench --config qwen2.5-vl-7b --device cuda --dtype bf16 --tokens 16384 \
    --stages scoring,prefill --markdown
limited 60 "$PYTHON" -m hawk_compile bench --config qwen2.5-vl-3b --device cuda --dtype bf16 --tokens 1024 \
    --stages prefill,first,decode --ratios 0.8 --markdown
limited 40 "$PYTHON" benchmarks/padding.py --device cuda --dtype bf16
