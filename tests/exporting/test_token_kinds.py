"""Kinds of tokens, from which a model makes its mask, are inputs of the exported prefill too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile
from hawk_compile.exporting import prefill
from hawk_compile.settings.config import HawkConfig
from tests.runtime.models import ROUNDING
from tests.runtime.test_per_token import arguments, molmo2, optimised


@torch.no_grad()
def test_visual_tokens_attend_both_ways_in_an_exported_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `mm_token_type_ids`: the graph of an export, pruned, against the optimised model."""
    given: dict[str, Any] = arguments()
    monkeypatch.setattr(prefill, "encoded_prompt", lambda model, inputs: dict(inputs))  # it is encoded
    component = prefill.prefill_component(molmo2(), given, HawkConfig(ratio=0.5), torch.full((4,), 0.25))
    assert component.shapes["mm_token_type_ids"] == ("batch", "prompt")
    graph = prefill.prune(component, HawkConfig(ratio=0.5), portable=False).module
    found = graph(**component.sample)
    expected = optimised(0.5)(**arguments(), logits_to_keep=1)
    assert found["keep"][0].tolist() == hawk_compile.report(expected).keep_indices[0].tolist()
    torch.testing.assert_close(found["logits"][:1], expected.logits[:, -1], **ROUNDING)
    flipped = component.sample | {"mm_token_type_ids": torch.zeros_like(component.sample["mm_token_type_ids"])}
    assert (graph(**flipped)["logits"] - found["logits"]).abs().max() > 0.05
