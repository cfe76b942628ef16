"""The scores, by the reference and by the Triton kernels, against an oracle in fp64."""

import pytest
import torch

from hawk_compile.kernels.score import reference
from tests.kernels import oracle
from tests.kernels.cases import SIZES, draw, folded, projected, scattered
from tests.marks import slow

NORMALIZATIONS = ("l2", "softmax", "minmax")
SMALL = SIZES["two KV heads, width 24"]


FEW, NONE = "one head, one visual token", "three rows, one without visual tokens"
LARGE = ("28 heads, 4 KV heads", "width 1,100")


@pytest.fixture(params=["reference", "kernel"])
def score(request):
    """`score("folded", *arguments)` by the plain definition or by the kernels."""
    if request.param == "reference":
        return lambda form, *arguments: getattr(reference, f"score_{form}")(*arguments)
    launch = request.getfixturevalue("launch")
    return lambda form, *arguments: launch(f"score.launch_{form}", *arguments)


@pytest.mark.parametrize(
    ("name", "normalization"),
    # The normalisations differ in what they make of few visual tokens, or none.
    [
        *((name, "l2") for name in SIZES),
        *((FEW, n) for n in ("softmax", "minmax")),
        *(pytest.param(NONE, n, marks=pytest.mark.slow) for n in ("softmax", "minmax")),
    ],
)
def test_sizes_and_normalizations(score, name, normalization):
    sizes = SIZES[name]
    arguments = folded(sizes, torch.float32, normalization)
    oracle.score_folded(*arguments).check(score("folded", *arguments))
    arguments = projected(sizes, torch.float32, normalization)
    oracle.score_projected(*arguments).check(score("projected", *arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", [FEW, *slow(*LARGE)])
def test_arithmetic_is_fp32_for_every_dtype(score, name, dtype):
    """The oracle's tolerance knows only fp32's epsilon: a product or sum rounded to bf16 or fp16 exceeds it."""
    arguments = folded(SIZES[name], dtype, "l2")
    oracle.score_folded(*arguments).check(score("folded", *arguments))
    arguments = projected(SIZES[name], dtype, "l2")
    oracle.score_projected(*arguments).check(score("projected", *arguments))


def test_no_bias(score):
    arguments = folded(SMALL, torch.float32, "minmax", bias=False)
    oracle.score_folded(*arguments).check(score("folded", *arguments))


def test_votes_weigh_the_tokens(score):
    arguments = folded(SMALL, torch.float32, "l2")
    plain = oracle.score_folded(*arguments)
    votes = torch.where(arguments[2], torch.arange(arguments[2].shape[1]).float(), 0.0)
    arguments[2] = votes
    weighed = oracle.score_folded(*arguments)
    assert ((weighed.scores - plain.scores).abs() > weighed.tolerance).any()
    weighed.check(score("folded", *arguments))
    arguments[2] = votes.to(torch.bfloat16)  # small whole numbers: exact
    weighed.check(score("folded", *arguments))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_row_without_voters_or_visual_tokens_scores_zero(score, normalization):
    arguments = folded(SIZES["three rows, one without visual tokens"], torch.float32, normalization)
    arguments[2][0] = False
    scores = score("folded", *arguments)
    assert torch.equal(scores[[0, 2]], torch.zeros_like(scores[[0, 2]]))
    assert scores[1].abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), pytest.param(float("-inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_non_finite_visual_token_has_raw_score_zero(score, normalization, value):
    arguments = folded(SMALL, torch.float32, normalization)
    arguments[0][0, 7, 3] = value  # a visual token
    expected = oracle.score_folded(*arguments)
    expected.check(score("folded", *arguments))
    arguments = projected(SMALL, torch.float32, normalization)
    arguments[1][0, :, 7, 3] = value
    oracle.score_projected(*arguments).check(score("projected", *arguments))


@pytest.mark.parametrize(("normalization", "share"), [("l2", 0.0), ("softmax", 1 / 20), ("minmax", 0.0)])
def test_a_non_finite_voter_makes_all_raw_scores_zero(score, normalization, share):
    arguments = folded(SMALL, torch.float32, normalization)
    arguments[0][0, -1, 3] = float("nan")
    scores = score("folded", *arguments)
    torch.testing.assert_close(scores, arguments[1] * torch.tensor(share))


def test_strided_inputs(score):
    arguments = folded(SIZES["three rows, one without visual tokens"], torch.bfloat16, "l2")
    expected = oracle.score_folded(*arguments)
    expected.check(score("folded", *[scattered(a) if isinstance(a, torch.Tensor) else a for a in arguments]))
    arguments = projected(SMALL, torch.float32, "softmax")
    expected = oracle.score_projected(*arguments)
    expected.check(score("projected", *[scattered(a) if isinstance(a, torch.Tensor) else a for a in arguments]))


def test_weights_of_another_dtype(score):
    arguments = folded(SMALL, torch.bfloat16, "l2")
    arguments[3:7] = [draw(*a.shape, seed=9) for a in arguments[3:7]]
    oracle.score_folded(*arguments).check(score("folded", *arguments))


def test_equal_inputs_give_equal_bits(score):
    arguments = folded(SIZES["28 heads, 4 KV heads"], torch.bfloat16, "l2")
    first = score("folded", *arguments)
    assert torch.equal(first, score("folded", *arguments))


@pytest.mark.parametrize(("normalization", "size"), [("l2", 2600), ("minmax", 2600), ("softmax", 17_000)])
def test_statistics_over_several_blocks_of_positions(launch, normalization, size):
    """A block of statistics covers 1,024 positions, and 16 blocks are added up at a time; the extremes stand apart."""
    visual = torch.zeros(1, size, dtype=torch.bool)
    visual[:, 50:1300] = True
    visual[:, -200:-50] = True
    query = torch.ones(1, 1, size, 8)
    key = draw(1, 1, size, 8, seed=11)
    key[0, 0, 60] = -3.0
    key[0, 0, -60] = 3.0
    arguments = [query, key, visual, ~visual, torch.ones(1), normalization]
    oracle.score_projected(*arguments).check(launch("score.launch_projected", *arguments))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_folded_equals_projected_where_q_and_k_are_linear(normalization):
    arguments = folded(SIZES["28 heads, 4 KV heads"], torch.float32, normalization)
    hidden, visual, query, wq, bq, wk, bk, weights, _ = arguments
    hidden = hidden.nan_to_num()
    shape = (*hidden.shape[:2], -1, SIZES["28 heads, 4 KV heads"].head_dim)
    q = torch.nn.functional.linear(hidden, wq, bq).view(shape).transpose(1, 2)
    k = torch.nn.functional.linear(hidden, wk, bk).view(shape).transpose(1, 2)
    expected = oracle.score_folded(*arguments)
    expected.check(reference.score_folded(*arguments))
    expected.check(reference.score_projected(q, k, visual, query, weights, normalization))
