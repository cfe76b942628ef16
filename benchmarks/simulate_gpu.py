"""A model of a pruned prefill on a GPU, from its graph: launches, bytes and operations of both halves.

    python benchmarks/simulate_gpu.py [--profile qwen2.5-vl-7b] [--visual 576 1024 4096 16384] [--ratios 0.5 0.8 0.9]
    python benchmarks/simulate_gpu.py --check        against the H100 figures of benchmarks/RESULTS.md

The graph is that of the real capture and the real passes, on weights without memory, as ATen operators of the prompt's
sizes. Its front is what runs at full length (merge, norm, score, selection, gather), its decoder half the rest. What a
compiler joins is guessed: pointwise operators and reductions that hang together, with no product between them, are one
kernel, which reads what comes from outside once and writes what is read outside once. Products, attention and this
package's operators are kernels of their own. Layouts are free. Layers are counted from graphs of one and two.

The roofline of a kernel is its bytes over the memory's rate or its FLOPs over the arithmetic's, whichever is longer, at
the rates that the data sheets promise; no kernel reaches them, so a sum of rooflines is a floor. Beside it the host: so
many launches, 5 us each, in turns with nothing else. Both are a model: what a GPU takes is in RESULTS alone.
"""

import argparse
import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from hawk_compile.capture.features import EXTRA_ROWS
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import PRUNING, run_passes
from hawk_compile.kernels.plan.op import VISUAL_OFFSET
from hawk_compile.passes.site import Split, read
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.benchmarking.profiles import PROFILES, qwen2_5_vl_scaled
from hawk_compile.tools.inspection.sample import captured
from hawk_compile.tools.inspection.without_weights import hollow, keep_layers, on_meta

TEXT = 64
CAPTURED = 1000
"""Visual tokens of the prompt that is captured: its sizes differ from one another and from the model's own."""
LAUNCH = 5e-6
"""Seconds of the host for a kernel: what `cudaLaunchKernel` takes behind Inductor's wrapper, roughly."""
GPUS = {"H100": (3.35e12, 989e12), "L4": (0.30e12, 121e12)}
"""Bytes and bf16 FLOPs per second, dense, by NVIDIA's data sheets (H100 SXM5)."""
FREE = (
    "hawk.plan", "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select",
    "unsqueeze", "squeeze", "alias", "detach", "split", "split_with_sizes", "unbind", "as_strided", "lift_fresh",
    "empty", "sym_size", "movedim", "_assert_async", "_assert_scalar", "_assert_tensor_metadata",
)  # fmt: skip
"""Operators of ATen that launch nothing."""
ALONE = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "sort", "topk", "cumsum", "nonzero", "masked_scatter", "index_put",
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "embedding", "index", "gather",
    "scatter", "score_folded", "score_projected", "select_rows",
)  # fmt: skip
"""Operators that no compiler joins with others here."""
ROWS = ("embedding", "index", "gather")
"""Of these the first operand is read where rows are taken, not whole."""
LAUNCHES = {"hawk.score_folded": 7, "hawk.score_projected": 4}
"""Kernels of this package's operators, where they are more than one; see `kernels/score/triton_kernel.py`."""
MEASURED: dict[tuple[int, float | None], float] = {
    (576, None): 5.47, (576, 0.5): 8.20, (576, 0.8): 8.13, (576, 0.9): 8.28,
    (1024, None): 7.02, (1024, 0.5): 7.30, (1024, 0.8): 6.43, (1024, 0.9): 6.44,
    (4096, None): 29.63, (4096, 0.5): 17.02, (4096, 0.8): 8.58, (4096, 0.9): 6.96,
    (16384, None): 234.56, (16384, 0.5): 81.83, (16384, 0.8): 32.96, (16384, 0.9): 16.27,
}  # fmt: skip
"""(V, fraction removed; None: compiled without pruning) -> ms on an H100, "On a GPU: Prefill" in RESULTS.md."""


@dataclass
class Work:
    """Launches one by one and joined, bytes and FLOPs of the joined kernels, and how long each takes at least."""

    operators: float = 0
    kernels: float = 0
    bytes: float = 0
    flops: float = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GPUS, 0.0))

    def add(self, launches: int, moved: float, flops: float) -> None:
        self.kernels += launches
        self.bytes += moved
        self.flops += flops
        for gpu, (bandwidth, rate) in GPUS.items():
            self.seconds[gpu] += max(moved / bandwidth, flops / rate)

    def plus(self, other: "Work", times: float) -> "Work":
        """This and so many times the other."""
        numbers = {name: getattr(self, name) + times * getattr(other, name)
                   for name in ("operators", "kernels", "bytes", "flops")}  # fmt: skip
        return Work(**numbers, seconds={gpu: spent + times * other.seconds[gpu] for gpu, spent in self.seconds.items()})


def name_of(node: fx.Node) -> str:
    """`mm` of aten, with its library of others: `hawk.select`."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    library, name = node.target._schema.name.split("::")
    return name.removesuffix("_") if library == "aten" and not name.startswith("_") else (
        name if library == "aten" else f"{library}.{name}"
    )  # fmt: skip


def launches(node: fx.Node) -> int:
    name = name_of(node)
    return 0 if not name or name in FREE else LAUNCHES.get(name, 1)


def alone(node: fx.Node) -> bool:
    return name_of(node) in ALONE or name_of(node).startswith("hawk.")


def tensors(node: fx.Node) -> list[Tensor]:
    held = node.meta.get("val")
    return [each for each in (held if isinstance(held, (list, tuple)) else [held]) if isinstance(each, Tensor)]


def size(node: fx.Node) -> int:
    """Bytes of what a node holds."""
    return sum(each.numel() * each.element_size() for each in tensors(node))


def read_by(node: fx.Node) -> dict[fx.Node, int]:
    """What a node reads, through views -> bytes: the smaller of a view and of what it views."""
    found: dict[fx.Node, int] = {}
    for given in node.all_input_nodes:
        source, moved = given, size(given)
        while source.op == "call_function" and not launches(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
            moved = min(moved, size(source)) if tensors(source) else moved
        if tensors(source):
            found[source] = min(found.get(source, moved), moved)
    if name_of(node) in ROWS:
        found[next(iter(found))] = size(node)
    return found


def flops_of(node: fx.Node) -> float:
    """Of products and attention; a multiply-add is two, causal attention counts half."""
    name = name_of(node)
    if "scaled_dot_product" in name:
        query, key = (arg.meta["val"] for arg in node.args[:2])  # type: ignore[union-attr]
        pairs = query.shape[2] * key.shape[2]
        causal = any(arg is True for arg in node.args[3:]) or node.kwargs.get("is_causal") is True
        return 4 * math.prod(query.shape[:2]) * pairs * query.shape[3] / (2 if causal else 1)
    if name == "hawk.score_folded":
        hidden, query = node.args[0].meta["val"], node.args[3].meta["val"]  # type: ignore[union-attr]
        return 4.0 * query.numel() + 2.0 * hidden.numel() * node.args[7].meta["val"].numel()  # type: ignore[union-attr]
    counted = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if counted is None:
        return 0
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    return float(counted(*values, out_val=node.meta["val"]))


def kernels_of(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """What a compiler would make one kernel of, in an order in which they can run; nodes as in their graph."""
    chosen = [node for node in nodes if launches(node)]
    stage: dict[fx.Node, int] = {}
    group: dict[fx.Node, fx.Node] = {}

    def leader(node: fx.Node) -> fx.Node:
        while group[node] is not node:
            node = group[node]
        return node

    for node in chosen:
        before = [source for source in read_by(node) if source in stage]
        stage[node] = max((stage[source] + (alone(source) or alone(node)) for source in before), default=0)
        group[node] = node
        for source in before:
            if not alone(node) and not alone(source) and stage[source] == stage[node]:
                group[leader(source)] = leader(node)
    joined: dict[fx.Node, list[fx.Node]] = {}
    for node in chosen:
        joined.setdefault(leader(node), []).append(node)
    return sorted(joined.values(), key=lambda members: stage[members[0]])


def readers_of(nodes: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What reads each value, through views; the graph's output among them."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        for source in read_by(node) if launches(node) or node.op == "output" else ():
            found.setdefault(source, set()).add(node)
    return found


def count(nodes: Iterable[fx.Node]) -> Work:
    """The work of some nodes of an ATen graph, in its order; what others read of them is written."""
    kernels = kernels_of(nodes)
    readers = readers_of(kernels[0][0].graph.nodes) if kernels else {}
    work = Work(operators=sum(launches(node) for members in kernels for node in members))
    for members in kernels:
        inside = set(members)
        outside: dict[fx.Node, int] = {}
        for node in members:
            for source, moved in read_by(node).items():
                if source not in inside:
                    outside[source] = max(outside.get(source, 0), moved)
        written = sum(size(node) for node in members if not readers.get(node, set()) <= inside)
        work.add(launches(members[0]) if len(members) == 1 else 1, sum(outside.values()) + written,
                 sum(map(flops_of, members)))  # fmt: skip
    return work


def peak(nodes: list[fx.Node]) -> int:
    """Most bytes that kernels have written, inputs left out, if a value goes with the last kernel that reads it."""
    kernels, readers = kernels_of(nodes), readers_of(nodes)
    number = {node: place for place, members in enumerate(kernels) for node in members}
    end = len(kernels)  # what the graph returns stays
    freed = [0] * (end + 1)
    alive = most = 0
    for place, members in enumerate(kernels):
        for node in members:
            reading = readers.get(node, set())
            if reading <= set(members) and reading:
                continue  # never written
            alive += size(node)
            freed[max((number.get(reader, end) for reader in reading), default=place)] += size(node)
        most = max(most, alive)
        alive -= freed[place]
    return most


def as_aten(
    gm: fx.GraphModule, marks: frozenset[fx.Node], sizes: dict[int, int]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The graph in ATen operators, at other sizes than it was captured at: (what `marks` became, the other nodes)."""
    marked: set[str] = set()

    class Marking(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            mode = get_proxy_mode()
            assert mode is not None
            graph = mode.tracer.graph
            before = len(graph.nodes)
            result = super().run_node(node)
            if node in marks:
                marked.update(each.name for each in list(graph.nodes)[before:])
            return result

    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [at_size(node.meta["example_value"], sizes) for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        traced = make_fx(Marking(gm).run, _allow_non_fake_inputs=True)(*inputs)
    traced.graph.eliminate_dead_code()
    nodes = list(traced.graph.nodes)
    return [each for each in nodes if each.name in marked], [each for each in nodes if each.name not in marked]


def at_size(held: Any, sizes: dict[int, int]) -> Any:
    """A tensor without memory, or a number, of a capture's example; symbolic sizes that are named are replaced."""
    if isinstance(held, Tensor):
        return torch.empty([at_size(each, sizes) for each in held.shape], dtype=held.dtype)
    return held if isinstance(held, (int, float, bool)) else sizes.get(int(held.node.hint), int(held.node.hint))


def lengths(visual: int, kept: int) -> tuple[int, ...]:
    """The sizes that a captured prefill reads: S, the features' rows, S' and the rows that say V'."""
    return TEXT + visual, visual + EXTRA_ROWS, TEXT + kept, kept + VISUAL_OFFSET


class Graphs:
    """The prefill of a config as captured, and behind the passes, with one layer and with two."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.layers = config.get_text_config().num_hidden_layers
        settings = HawkConfig(ratio=0.8)
        self.captured_at = lengths(CAPTURED, settings.kept(CAPTURED))
        self.plain, self.pruned = [], []
        for layers in (1, 2):
            model = on_meta(config).to(torch.bfloat16)
            keep_layers(model, layers, self.layers)
            prefill = captured(hollow(model), settings, TEXT + CAPTURED, CAPTURED, "image")
            self.plain.append(copy.deepcopy(prefill.gm))
            self.pruned.append(run_passes(prefill.gm, prefill.example_inputs, options_of(settings), PRUNING))

    def halves(self, visual: int, ratio: float | None) -> tuple[Work, Work]:
        """(front, decoder half) of a prompt of one image and TEXT other tokens; without a ratio all is the second."""
        kept = HawkConfig(ratio=ratio or 0.0).kept(visual)
        sizes = dict(zip(self.captured_at, lengths(visual, kept), strict=True))
        counted = []
        for gm in self.plain if ratio is None else self.pruned:
            nodes = list(gm.graph.nodes)
            front = frozenset(nodes[: 0 if ratio is None else nodes.index(read(gm, Split).boundary)])
            counted.append(tuple(map(count, as_aten(gm, front, sizes))))
        (front_one, one), (front_two, two) = counted
        more = self.layers - 1
        return front_one.plus(front_two.plus(front_one, -1), more), one.plus(two.plus(one, -1), more)


def table(config: PreTrainedConfig, visuals: list[int], ratios: list[float], measured: bool) -> Iterable[str]:
    """Markdown: a line for each prompt and ratio."""
    graphs = Graphs(config)
    heads = ["V", "removed", "half", "operators", "kernels", "GB", "TFLOP", *(f"{gpu} ms" for gpu in GPUS), "host ms"]
    yield f"| {' | '.join(heads)} |" + (" measured ms | measured / model |" if measured else "")
    yield "| " + " | ".join(["---:"] * (len(heads) + 2 * measured)) + " |"
    for visual in visuals:
        for ratio in (None, *ratios):
            both = graphs.halves(visual, ratio)
            whole = both[0].plus(both[1], 1)
            parts = {"whole": whole} if ratio is None else {"front": both[0], "decoder": both[1], "whole": whole}
            for part, work in parts.items():
                host = work.kernels * LAUNCH
                cells = [f"{visual:,}", "none" if ratio is None else f"{ratio:g}", part, f"{work.operators:,.0f}",
                         f"{work.kernels:,.0f}", f"{work.bytes / 1e9:.3f}", f"{work.flops / 1e12:.3f}",
                         *(f"{1e3 * spent:.2f}" for spent in work.seconds.values()), f"{1e3 * host:.2f}"]  # fmt: skip
                if measured:
                    took = MEASURED.get((visual, ratio)) if part == "whole" else None
                    model = 1e3 * max(work.seconds["H100"], host)
                    cells += ["", ""] if took is None else [f"{took:.2f}", f"{took / model:.2f}"]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="qwen2.5-vl-7b", choices=PROFILES)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 1024, 4096, 16384])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--check", action="store_true", help="the model that was measured on an H100, beside its times")
    given = parser.parse_args()
    config = PROFILES[given.profile]()
    if given.check:  # the decoder that the table "On a GPU: Prefill" is of
        config = qwen2_5_vl_scaled(layers=8, width=3584, vision_layers=1, vision_width=32)
    print("A model, not a measurement: see the head of benchmarks/simulate_gpu.py\n")
    for line in table(config, given.visual, given.ratios, given.check):
        print(line, flush=True)


if __name__ == "__main__":
    main()
