"""How long the first prefill takes to compile: by the number of decoder layers, with and without `fold_layers`, with an
empty cache on disk and with the one that this left.

    python benchmarks/compile_time.py [--layers 1 8 28]

Every figure is the first call of a process of its own, of a model with random weights (Qwen2.5-VL, 256 wide).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from hawk_compile.tools.environment import measured_on

ONE = "--one"


def first_call(layers: int) -> float:
    """Seconds of the first pruned prefill in this process."""
    import torch

    import hawk_compile
    from hawk_compile.tools.benchmarking import prompts
    from hawk_compile.tools.benchmarking.images import picture
    from hawk_compile.tools.benchmarking.models import load
    from hawk_compile.tools.benchmarking.profiles import qwen2_5_vl_scaled

    config = qwen2_5_vl_scaled(layers=layers, width=256, vision_layers=1, vision_width=32)
    model = hawk_compile.optimize(load(config, torch.device("cpu"), torch.float32, None, False)[0], ratio=0.8)
    prompt = prompts.make(model, picture(config, 64), 16, 1, torch.device("cpu"))
    with torch.no_grad():
        given = prompts.encode(model, prompt)
        started = time.perf_counter()
        model(**given)
    return time.perf_counter() - started


def in_a_process(layers: int, left_out: str, cache: str) -> float:
    environment = {**os.environ, "HAWK_DISABLE": left_out, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, ONE, str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 28])
    parser.add_argument(ONE, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(first_call(options.one))
        return
    print(measured_on("cpu"))
    print("| layers | empty cache, s | unfolded, s | cache on disk, s | unfolded, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for layers in options.layers:
        spent: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            for left_out in ("", "fold_layers"):
                cache = os.path.join(folder, left_out or "all")
                spent += [in_a_process(layers, left_out, cache) for _ in range(2)]
        cold, warm, unfolded_cold, unfolded_warm = spent
        print(f"| {layers} | {cold:.1f} | {unfolded_cold:.1f} | {warm:.1f} | {unfolded_warm:.1f} |", flush=True)


if __name__ == "__main__":
    main()
