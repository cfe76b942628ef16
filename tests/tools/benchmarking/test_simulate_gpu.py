"""The model of a GPU in benchmarks/simulate_gpu.py, on graphs that are counted by hand."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.simulate_gpu import GPUS, Work, count, flops_of, peak

F = 4  # bytes of a float32


def traced(function, *shapes):
    return make_fx(function, tracing_mode="fake")(*(torch.empty(shape) for shape in shapes)).graph


def test_a_layer_counted_by_hand():
    """A norm, a product, and an activation with a sum: three kernels of eight operators."""

    def layer(x, weight):
        normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)  # pow, mean, add, rsqrt, mul
        return torch.relu(normed @ weight.t()) + x  # mm, relu, add; t is free

    work = count(traced(layer, (8, 16), (16, 16)).nodes)
    x, weight = 8 * 16 * F, 16 * 16 * F
    assert (work.operators, work.kernels) == (8, 3)
    # The norm reads x and writes as much; so does the product, beside the weight; the last reads two and writes one.
    assert work.bytes == 2 * x + (x + weight + x) + 3 * x
    assert work.flops == 2 * 8 * 16 * 16
    for gpu, (bandwidth, rate) in GPUS.items():
        moved = (2 * x, 2 * x + weight, 3 * x)
        expected = [max(each / bandwidth, flops / rate) for each, flops in zip(moved, (0, work.flops, 0), strict=True)]
        assert work.seconds[gpu] == pytest.approx(sum(expected))


def test_what_does_not_hang_together_is_no_kernel_of_one():
    """A value that a product and a sum behind it both read is written once and read twice."""

    def function(x, weight):
        doubled = x * 2
        return doubled @ weight + doubled, x.sum()

    work = count(traced(function, (4, 4), (4, 4)).nodes)
    square = 4 * 4 * F
    assert work.kernels == 4
    assert work.bytes == 2 * square + 3 * square + 3 * square + (square + F)


def test_rows_that_are_taken_are_read_alone():
    def function(table, keep):
        return table[keep]

    graph = make_fx(function, tracing_mode="fake")(torch.empty(1000, 8), torch.zeros(5, dtype=torch.long)).graph
    assert count(graph.nodes).bytes == 2 * (5 * 8 * F) + 5 * 8


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_half_where_it_is_causal(causal):
    def function(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    graph = traced(function, *[(1, 2, 32, 16)] * 3)
    assert sum(map(flops_of, graph.nodes)) == 4 * 2 * 32 * 32 * 16 / (2 if causal else 1)


def test_layers_are_counted_from_one_and_two():
    one, two = Work(operators=10, kernels=4, bytes=100, flops=7), Work(operators=16, kernels=6, bytes=150, flops=9)
    assert one.plus(two.plus(one, -1), 27).kernels == 4 + 27 * 2
    assert one.plus(two.plus(one, -1), 27).bytes == 100 + 27 * 50


def test_values_go_with_the_last_that_reads_them():
    """Two products, of which the second's result replaces what only the first read; what is joined is never written."""

    def function(x, weight):
        first = (x * 2 + 1) @ weight  # one kernel writes x's size, the product reads it and writes as much
        return first @ weight + 1

    assert peak(list(traced(function, (16, 16), (16, 16)).nodes)) == 2 * 16 * 16 * F
