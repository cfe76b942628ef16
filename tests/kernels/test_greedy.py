"""`hawk::greedy_order`, the reference and the Triton kernel, against the rules written out with numpy."""

import numpy as np
import pytest
import torch

import hawk_compile.kernels.greedy.op  # noqa: F401  registers the operator
from hawk_compile.kernels.greedy import lazy, reference

SHAPES = [(1, 1, 3), (1, 7, 5), (2, 33, 17), (3, 40, 8)]


@pytest.fixture(params=["reference", "lazy", "kernel"])
def greedy_order(request, launch, device):
    """Each implementation; a kernel of several programs a row where they run at once, on CUDA."""
    if request.param != "kernel":
        return {"reference": reference, "lazy": lazy}[request.param].greedy_order
    return lambda *arguments: launch(
        "greedy.launch_greedy_order", *arguments, programs=None if device == "cuda" else 1, block=16
    )


def case(rows, length, width, seed=0):
    """Features, importance and a mask; the last row of a batch holds a single visual token."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, length, width, generator=generator)
    importance = torch.rand(rows, length, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    if rows > 1:
        mask[-1] = False
        mask[-1, length // 2] = True
    return features, importance, mask


def by_hand(features, importance, mask, steps, rule, weight):
    """The visual tokens of one row in the order they are taken."""
    places = np.flatnonzero(mask)
    unit = features[places].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similar = unit @ unit.T
    value = importance[places].astype(np.float64)
    spread = value.max() - value.min()
    value = (value - value.min()) / spread if spread else np.ones_like(value)
    taken = []
    for _ in range(min(steps, len(places))):
        rest = [each for each in range(len(places)) if each not in taken]
        if rule == "max_min":
            pool = [[other for other in range(len(places)) if other != each] for each in rest] if not taken else None
            gains = [-max((similar[each, other] for other in (pool[i] if pool else taken)), default=-np.inf)
                     for i, each in enumerate(rest)]  # fmt: skip
        elif rule == "mmr":
            gains = [weight * value[each] - (1 - weight) * similar[each, taken].max() if taken else value[each]
                     for each in rest]  # fmt: skip
        else:
            kernel = value[:, None] * similar * value[None]
            gains = [np.linalg.det(kernel[np.ix_([*taken, each], [*taken, each])]) for each in rest]
        taken.append(rest[int(np.argmax(gains))])
    return places[taken].tolist()


@pytest.mark.parametrize("rule", list(reference.RULES))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_is_that_of_the_rule(greedy_order, rule, shape):
    features, importance, mask = case(*shape)
    steps = 4 if rule == "dpp" else 9  # of which determinants are still far from 0
    budget = torch.full((shape[0],), steps)
    order = greedy_order(features, importance, mask, budget, rule, 0.5)
    assert order.dtype == torch.float32 and order[~mask].count_nonzero() == 0
    for row in range(shape[0]):
        expected = by_hand(features[row].numpy(), importance[row].numpy(), mask[row].numpy(), steps, rule, 0.5)
        found = order[row].argsort(descending=True, stable=True)[: len(expected)].tolist()
        assert found == expected
        assert order[row].count_nonzero() == len(expected)


@pytest.mark.parametrize("rule", list(reference.RULES))
def test_a_shorter_choice_is_the_start_of_a_longer_one(rule):
    features, importance, mask = case(1, 50, 16)
    orders = [torch.ops.hawk.greedy_order(features, importance, mask, torch.tensor([steps]), rule, 0.5)
              for steps in (3, 11)]  # fmt: skip
    short, long = (set(order[0].topk(3).indices.tolist()) for order in orders)
    assert short == long


def test_blocks_of_similarities_change_nothing(monkeypatch):
    features, importance, mask = case(2, 37, 8)
    whole = torch.ops.hawk.greedy_order(features, importance, mask, torch.tensor([9, 9]), "max_min", 0.0)
    monkeypatch.setattr(reference, "BLOCK", 5)
    parts = torch.ops.hawk.greedy_order(features, importance, mask, torch.tensor([9, 9]), "max_min", 0.0)
    assert torch.equal(whole, parts)


def test_rows_without_visual_tokens_and_features_without_length(greedy_order):
    features, importance, mask = case(2, 12, 4)
    mask[0] = False
    features[1] = 0
    for rule in reference.RULES:
        order = greedy_order(features, importance, mask, torch.tensor([3, 3]), rule, 0.5)
        assert order[0].count_nonzero() == 0 and order.isfinite().all()


def test_where_the_determinant_cannot_grow_importance_says_what_is_next(greedy_order):
    """Of 4 features 4 tokens say all; and of tokens that are all alike the first."""
    features, importance, mask = case(1, 30, 4)
    order = greedy_order(features, importance, mask, torch.tensor([9]), "dpp", 0.0)
    taken = order[0].argsort(descending=True, stable=True)[:9].tolist()
    assert taken[:4] == by_hand(features[0].numpy(), importance[0].numpy(), mask[0].numpy(), 4, "dpp", 0.0)
    rest = [each for each in np.flatnonzero(mask[0]) if each not in taken[:4]]
    assert taken[4:] == sorted(rest, key=lambda each: -importance[0, each])[:5]
    assert order[0].count_nonzero() == 9
    alike = greedy_order(torch.ones(1, 30, 4), torch.ones(1, 30), mask, torch.tensor([5]), "dpp", 0.0)
    assert alike[0].nonzero().squeeze(1).tolist() == np.flatnonzero(mask[0])[:5].tolist()


@pytest.fixture
def few_candidates(monkeypatch):
    """So that small prompts take many rounds; rounds that counted, of how many tokens each."""
    monkeypatch.setattr(lazy, "CANDIDATES", 7)
    monkeypatch.setattr(lazy, "STEPS", 4)
    rounds, by_candidates = [], lazy.by_candidates
    monkeypatch.setattr(lazy, "by_candidates", lambda *given: rounds.append(by_candidates(*given)) or rounds[-1])
    return rounds


@pytest.mark.parametrize("rule", list(reference.RULES))
@pytest.mark.parametrize("kind", ["random", "neighbours alike"])
def test_candidates_take_what_the_definition_takes(few_candidates, rule, kind):
    """In rounds that end because all their steps are done, and such as the candidates cannot go on with."""
    features, importance, mask = case(3, 150, 64)
    if kind == "neighbours alike":
        features = features.cumsum(1) * 0.1 + features
    arguments = (features, importance, mask, torch.tensor([30, 20, 2]), rule, 0.3)
    found = lazy.greedy_order(*arguments)
    assert torch.equal(found, reference.greedy_order(*arguments))
    assert {len(each) for each in few_candidates if each} >= {1, 4}


@pytest.mark.parametrize("rule", ["max_min", "mmr"])
def test_ties_go_to_the_lower_position(few_candidates, greedy_order, rule):
    """16 of 32 features are 1 or -1, so that lengths and cosines are exact; every token is there three times."""
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(1, 30, 32, generator=generator).argsort(2) < 16
    features = torch.where(places, torch.randint(0, 2, (1, 30, 32), generator=generator) * 2.0 - 1, 0.0)
    features = features[:, torch.arange(90) % 30]
    importance, mask = torch.arange(90)[None] % 5 / 4, torch.ones(1, 90, dtype=torch.bool)
    order = greedy_order(features, importance, mask, torch.tensor([20]), rule, 0.5)
    found = order[0].argsort(descending=True, stable=True)[:20].tolist()
    assert found == by_hand(features[0].numpy(), importance[0].numpy(), mask[0].numpy(), 20, rule, 0.5)


@pytest.mark.parametrize("rule", list(reference.RULES))
def test_padding_does_not_change_what_is_taken(rule):
    features, importance, mask = case(1, 60, 16)
    pad = torch.nn.functional.pad
    padded = (pad(features, (0, 0, 5, 9), value=7.0), pad(importance, (5, 9), value=9.0), pad(mask, (5, 9)))
    prompts = ((features, importance, mask), padded)
    short, long = (lazy.greedy_order(*each, torch.tensor([12]), rule, 0.5) for each in prompts)
    assert torch.equal(long[:, 5:-9], short) and long.count_nonzero() == short.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", list(reference.RULES))
def test_half_precision_and_strides(launch, device, rule, dtype):
    """Similarities are fp32, whatever the features are, and these may be part of something larger."""
    features, importance, mask = case(2, 45, 40)
    features = features.to(dtype)[:, :, ::2]
    arguments = (features, importance, mask, torch.tensor([6, 4]), rule, 0.5)
    found = launch("greedy.launch_greedy_order", *arguments, programs=None if device == "cuda" else 1)
    assert torch.equal(found, reference.greedy_order(*arguments))


def test_opcheck():
    features, importance, mask = case(2, 12, 4)
    torch.library.opcheck(
        torch.ops.hawk.greedy_order.default, (features, importance, mask, torch.tensor([3, 2]), "mmr", 0.5)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(2, 12)}, r"features must be \[B, S, D\]"),
        ({"importance": torch.ones(2, 11)}, r"importance must be \[B, S\]"),
        ({"mask": torch.ones(2, 12)}, r"visual_mask must be \[B, S\] bool"),
        ({"budget": torch.ones(2)}, r"budget must be \[B\] int64"),
        ({"rule": "best"}, "rule must be one of max_min, mmr, dpp"),
        ({"weight": 1.5}, r"weight is the share of importance and must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_right_is_refused(change, message):
    features, importance, mask = case(2, 12, 4)
    arguments = {"features": features, "importance": importance, "mask": mask, "budget": torch.tensor([3, 2]),
                 "rule": "mmr", "weight": 0.5}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        torch.ops.hawk.greedy_order(*{**arguments, **change}.values())
