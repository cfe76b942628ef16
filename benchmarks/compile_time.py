"""How long the first prefill of a new process takes: with an empty cache on disk, with the one that this left, and with
the graphs that `hawk_compile.save_compiled` wrote, by the number of decoder layers.

    OMP_NUM_THREADS=1 python benchmarks/compile_time.py [--layers 1 28] [--unfolded]

Every figure is the first call of a process of its own, of a model with random weights (Qwen2.5-VL, 256 wide), behind
loading it. That of saved graphs has an empty cache, and counts `load_compiled` too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from hawk_compile.tools.environment import measured_on

ONE = "--one"
ANSWER, SAVE, LOAD = "answer", "save", "load"


def first_call(layers: int, task: str, folder: str) -> dict[str, Any]:
    """Seconds of the first pruned prefill in this process, and of saving its graph where that is asked for."""
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
        if task == LOAD:
            hawk_compile.load_compiled(model, folder)
        logits = model(**given).logits
    found = {"first": time.perf_counter() - started, "sum": float(logits.double().abs().sum())}
    if task == SAVE:
        started = time.perf_counter()
        assert not hawk_compile.save_compiled(model, folder)
        found["saving"] = time.perf_counter() - started
        found["bytes"] = sum(file.stat().st_size for file in os.scandir(folder))
    return found


def in_a_process(layers: int, task: str, folder: str, cache: str, left_out: str = "") -> dict[str, Any]:
    environment = {**os.environ, "HAWK_DISABLE": left_out, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, ONE, str(layers), task, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def row_of(layers: int, unfolded: bool) -> str:
    with tempfile.TemporaryDirectory() as place:
        folder, cache, empty = (os.path.join(place, name) for name in ("compiled", "cache", "empty"))
        cold = in_a_process(layers, SAVE, folder, cache)
        warm = in_a_process(layers, ANSWER, folder, cache)
        saved = in_a_process(layers, LOAD, folder, empty)
        assert abs(saved["sum"] - warm["sum"]) <= 1e-5 * warm["sum"], "saved graphs answer otherwise"
        figures = [cold["first"], warm["first"], saved["first"], cold["saving"]]
        if unfolded:
            others = os.path.join(place, "unfolded")
            figures += [in_a_process(layers, ANSWER, folder, others, "fold_layers")["first"] for _ in range(2)]
    cells, megabytes = [f"{seconds:.1f}" for seconds in figures], f"{cold['bytes'] / 1e6:.1f}"
    return f"| {layers} | {' | '.join([*cells[:4], megabytes, *cells[4:]])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 28])
    parser.add_argument("--unfolded", action="store_true", help="also without the pass fold_layers")
    parser.add_argument(ONE, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        layers, task, folder = options.one
        print(json.dumps(first_call(int(layers), task, folder)))
        return
    more = " unfolded, empty cache, s | cache on disk, s |" if options.unfolded else ""
    print(measured_on("cpu"))
    print(f"| layers | empty cache, s | cache on disk, s | saved graphs, s | saving them, s | MB |{more}")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |" + (" ---: | ---: |" if options.unfolded else ""))
    for layers in options.layers:
        print(row_of(layers, options.unfolded), flush=True)


if __name__ == "__main__":
    main()
