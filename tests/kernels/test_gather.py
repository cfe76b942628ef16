"""The gather, by the reference and by the Triton kernel, against loops over lists."""

import pytest
import torch

from hawk_compile.kernels.gather import reference
from tests.kernels.cases import scattered

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
]
TRAILING = [(), (1,), (5,), (3, 7), (2050,), (0,)]


@pytest.fixture(params=["reference", "kernel"])
def gather(request):
    if request.param == "reference":
        return reference.gather
    launch = request.getfixturevalue("launch")
    return lambda values, keep: launch("gather.launch_gather", values, keep)


def values_of(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 100, shape, generator=generator).to(dtype)


def positions(batch, size, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator)[:count].sort().values for _ in range(batch)])


def check(result, values, keep):
    assert result.dtype == values.dtype
    assert result.is_contiguous()
    rows = [torch.stack([values[b, s] for s in keep[b].tolist()]) for b in range(values.shape[0])]
    expected = torch.stack(rows)
    assert result.shape == expected.shape
    # Bytes, since float8 has no comparison.
    assert result.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(gather, dtype):
    values, keep = values_of((2, 30, 5), dtype), positions(2, 30, 11)
    check(gather(values, keep), values, keep)


@pytest.mark.parametrize("trailing", TRAILING, ids=str)
def test_every_trailing_shape(gather, trailing):
    values, keep = values_of((2, 12, *trailing), torch.float32), positions(2, 12, 5)
    check(gather(values, keep), values, keep)


def test_more_positions_than_a_program_copies(gather):
    values, keep = values_of((1, 3000), torch.int64), positions(1, 3000, 2500)
    check(gather(values, keep), values, keep)


def test_strided_inputs(gather):
    for trailing in ((), (5,), (3, 7)):
        values, keep = values_of((2, 30, *trailing), torch.bfloat16), positions(2, 30, 11)
        check(gather(scattered(values), scattered(keep)), values, keep)


def test_a_transposed_sequence(gather):
    """Position ids come as [rows, B, S] and are gathered along their last dimension."""
    ids, keep = values_of((4, 2, 30), torch.int64), positions(2, 30, 11)
    result = gather(ids.permute(1, 2, 0), keep)
    check(result, ids.permute(1, 2, 0).contiguous(), keep)
