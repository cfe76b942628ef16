"""The selection, by the reference and by the Triton kernel, against sorted lists and against its own promises."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hawk_compile.kernels.select import reference
from tests.kernels import oracle
from tests.kernels.cases import FLOATS, scattered

# Few different values, so that ties are the rule, and everything that floats can hold.
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3e38, -3e38]) | st.floats(width=32)


@st.composite
def rows(draw, most=40, scores=SCORES):
    """Arguments of select for B rows of S positions, with any masks, any budgets and a length that fits."""
    batch, size = draw(st.integers(1, 3)), draw(st.integers(1, most))
    row = st.lists(scores, min_size=size, max_size=size)
    mask = st.lists(st.booleans(), min_size=size, max_size=size)
    values = torch.tensor([draw(row) for _ in range(batch)], dtype=torch.float32)
    visual = torch.tensor([draw(mask) for _ in range(batch)])
    token = torch.tensor([draw(mask) for _ in range(batch)])
    budget = torch.tensor([draw(st.integers(0, size + 1)) for _ in range(batch)])
    candidates = (visual & token).sum(1)
    wanted = (token & ~visual).sum(1) + torch.minimum(budget, candidates)
    length = draw(st.integers(int(wanted.max()), size))
    return values, visual, token, budget, length


def agree(result, arguments):
    keep, valid = result
    expected_keep, expected_valid = oracle.select(*arguments)
    assert keep.dtype == torch.int64
    assert valid.dtype == torch.bool
    assert keep.tolist() == expected_keep
    assert valid.tolist() == expected_valid


@given(rows())
@settings(max_examples=200, deadline=None)
def test_reference_equals_the_rule(arguments):
    agree(reference.select(*arguments), arguments)


@given(arguments=rows())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernel_equals_the_rule(launch, arguments):
    # Blocks of 16 positions, so that rows are longer than one.
    agree(launch("select.launch_select", *arguments, block=16), arguments)


@given(rows())
@settings(max_examples=200, deadline=None)
def test_what_a_selection_promises(arguments):
    scores, visual, token, budget, length = arguments
    keep, valid = reference.select(*arguments)
    assert keep.shape == valid.shape == (scores.shape[0], length)
    assert ((keep >= 0) & (keep < scores.shape[1])).all()
    for b in range(scores.shape[0]):
        kept = set(keep[b][valid[b]].tolist())
        assert (keep[b][valid[b]].diff() > 0).all()
        text = set((token[b] & ~visual[b]).nonzero().flatten().tolist())
        candidates = set((token[b] & visual[b]).nonzero().flatten().tolist())
        assert text <= kept
        assert not text or not set(keep[b][~valid[b]].tolist()) & candidates
        assert kept <= text | candidates
        assert len(kept & candidates) == min(int(budget[b]), len(candidates))


def test_zeros_and_not_a_number(launch):
    """-0.0, 0.0 and NaN of either sign are equal: every budget must take them by position."""
    nan = torch.tensor([float("nan")]).copysign(torch.tensor([-1.0]))[0].item()
    row = torch.tensor([0.0, -1.0, float("nan"), -0.0, 1.0, nan, 0.0, float("inf"), -0.0, -float("inf")])
    scores = row.repeat(11, 1)
    everything = torch.ones_like(scores, dtype=torch.bool)
    arguments = (scores, everything, everything, torch.arange(11), 10)
    agree(reference.select(*arguments), arguments)
    agree(launch("select.launch_select", *arguments, block=16), arguments)


def random_row(size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, size, generator=generator)
    visual = torch.rand(2, size, generator=generator) < 0.9
    token = torch.rand(2, size, generator=generator) < 0.95
    budget = (visual & token).sum(1) // torch.tensor([5, 3])
    length = int(((token & ~visual).sum(1) + budget).max()) + 3
    return scores, visual, token, budget, length


def test_kernel_on_a_row_of_70000_positions(launch):
    arguments = random_row(70_000, seed=0)
    agree(launch("select.launch_select", *arguments), arguments)


def test_kernel_on_a_block_of_ties_across_blocks(launch):
    """All scores equal: which tokens stay follows from their positions alone."""
    scores, visual, token, _, _ = random_row(300, seed=1)
    budget = torch.tensor([60, 0])
    length = int((token & ~visual).sum(1).max()) + 60
    for value in (0.0, -2.5, 7.0):
        arguments = (torch.full_like(scores, value), visual, token, budget, length)
        agree(launch("select.launch_select", *arguments, block=64), arguments)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_kernel_on_strided_inputs(launch, dtype):
    scores, visual, token, budget, length = random_row(90, seed=2)
    arguments = (scores.to(dtype), visual, token, budget, length)
    strided = (*(scattered(a) for a in arguments[:4]), length)
    agree(launch("select.launch_select", *strided, block=64), arguments)
    agree(reference.select(*strided), arguments)


@pytest.mark.parametrize("length", [12, 30])
def test_a_length_that_does_not_fit_stays_within_bounds(launch, length):
    """Too short for what must stay, or longer than the row: not promised, but never an index outside of it."""
    scores, visual, token, budget, _ = random_row(20, seed=3)
    token[:] = True
    visual[:, :15] = False
    budget[:] = 3
    keep, valid = reference.select(scores, visual, token, budget, length)
    kernel_keep, kernel_valid = launch("select.launch_select", scores, visual, token, budget, length, block=16)
    assert ((keep >= 0) & (keep < 20)).all()
    assert torch.equal(kernel_keep, keep)
    assert torch.equal(kernel_valid, valid)
    wanted = (~visual).sum(1) + torch.minimum(budget, visual.sum(1))
    assert valid.sum(1).tolist() == wanted.clamp_max(length).tolist()
    assert all(keep[b][valid[b]][:12].tolist() == list(range(12)) for b in range(2))


@settings(deadline=None)
@given(rows(scores=st.integers(-9, 9).map(lambda number: number / 7)))
def test_selection_by_threshold_equals_the_rule(arguments):
    """On scores that lie further apart than 2^-40 of their range, or are equal."""
    agree(reference.select_by_threshold(*arguments), arguments)


@settings(deadline=None)
@given(rows(scores=st.sampled_from([-3e4, 640.0, 641.0, 3e4])))
def test_selection_by_threshold_of_large_scores(arguments):
    """Of which many are equal, and the largest too."""
    agree(reference.select_by_threshold(*arguments), arguments)
