"""Saved graphs of other models and of padded batches: plain, sliding windows, features for later layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hawk_compile
from tests import zoo
from tests.saved.test_saved import answer, prefill_of


def built(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return hawk_compile.optimize(zoo.build(name, layers=2), ratio=0.6, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_one_row_and_a_padded_batch(name: str, tmp_path: Path) -> None:
    eager, saving, loaded = built(name, backend="eager"), built(name), built(name)
    sizes = zoo.sizes(name)
    prompts = [zoo.inputs(name, eager, rows=[sizes[each] for each in rows]) for rows in ((4,), (0, 4))]
    expected = [answer(eager, inputs) for inputs in prompts]
    prefill_of(saving).kinds = prefill_of(eager).kinds
    assert hawk_compile.save_compiled(saving, tmp_path / "compiled") == []
    assert hawk_compile.load_compiled(loaded, tmp_path / "compiled") == len(prefill_of(eager).kinds)
    for inputs, other in zip(prompts, expected, strict=True):
        found = answer(loaded, inputs)
        torch.testing.assert_close(found.logits, other.logits, rtol=1e-5, atol=2e-5)
    assert (prefill_of(loaded).compilations, prefill_of(loaded).saved.answered) == (0, 2)
