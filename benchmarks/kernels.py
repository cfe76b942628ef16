"""How near `hawk::score_folded` comes to the memory bandwidth of a GPU.

    python benchmarks/kernels.py

The floor is one read of the visual tokens' hidden states, V * D elements. Beside it the time in which the same device
copies that much memory (half read, half written), measured here. Times are medians, in a CUDA graph, so that the host's
launches do not count; the "eager" column counts them. The weights of the query and key projections must be read too,
whatever V is: "all bytes" has them. Then each kernel's own time, by the profiler: `_raw_scores` is the one that reads
the visual tokens.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

BATCH, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 1, 3584, 28, 4, 128
VISUAL = (1024, 4096, 16384)
TEXT = 64  # tokens before the visual ones, and as many behind them, which vote
DTYPE = torch.bfloat16


def arguments(visual: int) -> list[Any]:
    """What a layer with grouped-query attention and biases hands to the operator for a prompt with one image."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(DTYPE)

    size = TEXT + visual + TEXT
    position = torch.arange(size, device="cuda").unsqueeze(0)
    question_mask = position >= TEXT + visual
    return [
        draw(BATCH, size, WIDTH),
        (position >= TEXT) & ~question_mask,
        question_mask,
        draw(HEADS * HEAD_DIM, WIDTH) * WIDTH**-0.5,
        draw(HEADS * HEAD_DIM),
        draw(KV_HEADS * HEAD_DIM, WIDTH) * WIDTH**-0.5,
        draw(KV_HEADS * HEAD_DIM),
        torch.full((HEADS,), 1 / HEADS, device="cuda"),
        "l2",
    ]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def graph_time(function: Callable[[], Any], rounds: int = 5) -> float:
    """Median milliseconds of a call replayed from a CUDA graph, with the L2 cache overwritten before each."""
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return statistics.median(do_bench(graph.replay, return_mode="median") for _ in range(rounds))


def kernel_times(function: Callable[[], Any], calls: int = 20) -> dict[str, float]:
    """Mean microseconds of every kernel of a call, with other memory in the L2 cache before each call.

    It is read, not written: what was written would have to leave the cache while the kernels are timed.
    """
    flush = torch.zeros(2**26, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            flush.sum()
            function()
        torch.cuda.synchronize()
    found = profile.key_averages()
    return {each.key: each.device_time_total / calls for each in found if each.key.startswith("_")}


def check() -> None:
    """Refuse to time kernels whose results are wrong."""
    from hawk_compile.kernels.score import reference

    inputs = arguments(VISUAL[0])
    actual = torch.ops.hawk.score_folded(*inputs).cpu()
    on_cpu: list[Any] = [a.cpu() if isinstance(a, torch.Tensor) else a for a in inputs]
    expected = reference.score_folded(*on_cpu)
    # Both are fp32; 1e-4 of the largest score is a thousand roundings, and less than one bf16 rounding.
    if not (actual - expected).abs().max() <= 1e-4 * expected.abs().max():
        sys.exit("score_folded does not equal its reference on this device: run `pytest tests/kernels` first.")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/kernels.py times CUDA kernels and found no CUDA device (torch.cuda.is_available() is False). "
            "Run it on a machine with an NVIDIA GPU and a CUDA build of PyTorch."
        )
    from triton.testing import do_bench

    import hawk_compile.kernels.score.op  # noqa: F401

    check()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {bandwidth / 1e9:,.0f} GB/s")
    print(f"score_folded, B={BATCH}, D={WIDTH}, H={HEADS}, Hkv={KV_HEADS}, d={HEAD_DIM}, {DTYPE}, {TEXT} voters")
    print(f"{'V':>7} {'graph us':>9} {'eager us':>9} {'floor us':>9} {'of bandwidth':>13} {'all bytes':>10}")
    for visual in VISUAL:
        inputs = arguments(visual)
        weights = (HEADS + KV_HEADS) * HEAD_DIM * WIDTH * DTYPE.itemsize
        floor = visual * WIDTH * DTYPE.itemsize
        call = functools.partial(torch.ops.hawk.score_folded, *inputs)
        eager = do_bench(call, return_mode="median")
        milliseconds = graph_time(call)
        reached = floor / (milliseconds / 1e3) / bandwidth
        everything = (floor + weights) / (milliseconds / 1e3) / bandwidth
        print(
            f"{visual:7,} {milliseconds * 1e3:9.1f} {eager * 1e3:9.1f} {floor / bandwidth * 1e6:9.1f} "
            f"{reached:13.0%} {everything:10.0%}"
        )
        for name, spent in kernel_times(call).items():
            share = f", {floor / (spent / 1e6) / bandwidth:.0%} of bandwidth" if name == "_raw_scores" else ""
            print(f"        {name:16} {spent:7.1f} us{share}")


if __name__ == "__main__":
    main()
