"""The rewritten graph compiled by Inductor, held to the eager model on hand-gathered inputs.

What the passes make of every architecture is tested without Inductor, in test_architectures.
"""

import pytest
import torch

import hawk_compile
from hawk_compile.tools.survey.tiny import build, prompt
from tests import zoo
from tests.marks import slow
from tests.test_architectures import RATIOS, check, compilations, eager_case, head_weights
from tests.tiny import tiny

SLOW = ("qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma")
"""Positions of several axes; a norm of queries and keys, and features for later layers; sliding windows; attention both
ways."""


@pytest.mark.parametrize("name", ["llava", *slow(*SLOW)])
def test_inductor_equals_the_hand_gathered_eager_model(name):
    """1e-5 is fp32 rounding over the layers in another order of summation. One layer, since compiling takes its time;
    layers that add features or switch attention get two."""
    model = zoo.build(name, layers=2 if name in ("qwen3_vl", "gemma3") else 1)
    cases = [eager_case(name, model, size, ratio) for size, ratio in zip(zoo.sizes(name)[1:5], RATIOS, strict=True)]
    for case in cases:
        hawk_compile.optimize(model, ratio=case.ratio, backend="inductor", head_weights=head_weights(model))
        check(model, case, 1e-5)
    assert compilations(model) == 1


@pytest.mark.slow
def test_a_selector_keeps_what_it_keeps_without_inductor():
    name = "qwen2_5_vl"
    model = zoo.build(name, layers=1)
    inputs = zoo.inputs(name, model, rows=[zoo.sizes(name)[3]])
    kept = []
    for backend in ("eager", "inductor"):
        hawk_compile.optimize(model, ratio=0.6, backend=backend, selector="idpruner")
        with torch.no_grad():
            model(**inputs)
        kept.append(hawk_compile.report(model).keep_indices[0])
    assert torch.equal(*kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5.linear_first", "step3p7", "qwen4_exp"])
def test_what_stands_in_the_graph_as_one_operator_is_the_same_by_inductor(name):
    """Mixers of chunks, experts in a loop, indexers. Rounding in fp32 is 2e-5 of the largest logit."""
    model, inputs = build(tiny(name)), prompt(tiny(name), 1)
    kept, logits = [], []
    for backend in ("eager", "inductor"):
        hawk_compile.optimize(model, ratio=0.5, backend=backend, head_weights="uniform")
        with torch.no_grad():
            logits.append(model(**inputs).logits)
        kept.append(hawk_compile.report(model).keep_indices[0])
    assert torch.equal(*kept) and len(kept[0]) < inputs["input_ids"].shape[1]
    assert (logits[0] - logits[1]).abs().max() <= 5e-5 * logits[0].abs().max()
