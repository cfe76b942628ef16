"""Models whose experts run in a loop over those that tokens choose (`experts_implementation="eager"`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hawk_compile import CaptureError
from hawk_compile.exporting.prefill import prefill_component
from hawk_compile.settings.config import HawkConfig
from hawk_compile.tools.survey.checks import at_ratio_zero, prefill
from hawk_compile.tools.survey.tiny import build, prompt
from tests.tiny import tiny

NAME = "aria"


def in_loops() -> Any:
    model = build(tiny(NAME))
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("check", [at_ratio_zero, prefill])
def test_the_loop_is_one_operator_of_the_captured_prefill(check: Any) -> None:
    check(tiny(NAME), in_loops())


def test_what_is_exported_is_to_be_loaded_without_loops() -> None:
    model = in_loops()
    weights = torch.full((model.config.get_text_config().num_attention_heads,), 1.0)
    component = prefill_component(model, prompt(tiny(NAME), rows=1), HawkConfig(ratio=0.5), weights)
    with pytest.raises(CaptureError, match=r'expert_hit.*model.set_experts_implementation\("grouped_mm"\)'):
        component.trace()
