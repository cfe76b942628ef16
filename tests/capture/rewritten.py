"""The passes of some settings on a prefill that is captured once for all settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from hawk_compile.capture.prefill import CapturedPrefill, capture_prefill
from hawk_compile.compile.backend import options_of
from hawk_compile.compile.pipeline import run_passes
from hawk_compile.errors import InputError
from hawk_compile.settings.config import HawkConfig
from tests.capture.calls import Call, call_of

captured: WeakKeyDictionary[PreTrainedModel, list[CapturedPrefill]] = WeakKeyDictionary()
"""Of each model, one for each structure of calls."""


def prefill_of(model: PreTrainedModel, call: Call) -> CapturedPrefill:
    """What was captured for calls like this one, or is now."""
    held = captured.setdefault(model, [])
    for prefill in held:
        try:
            prefill.arguments(*call)
        except InputError:
            continue
        return prefill
    held.append(capture_prefill(model, *call))
    return held[-1]


@dataclass(frozen=True)
class Result:
    """What the graph gives for a call.

    Attributes:
        keep_indices: ascending positions of each row.
        scores: [B, S].
        logits: [B, S', vocabulary].
    """

    keep_indices: list[Tensor]
    scores: Tensor
    logits: Tensor


class Rewritten:
    """As an optimised model: called with the inputs of one, it prefills, by graphs that are rewritten once.

    Args:
        model: a plain one, which is left as it is.
        settings: of `HawkConfig`.

    Attributes:
        graphs: what it has run, by the id of what was captured.
    """

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.options = options_of(HawkConfig(**settings))
        self.graphs: dict[int, fx.GraphModule] = {}

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Result:
        call = call_of(self.model, inputs, **self.settings)
        prefill = prefill_of(self.model, call)
        if id(prefill) not in self.graphs:
            self.graphs[id(prefill)] = run_passes(prefill.copy(), prefill.example_inputs, self.options)
        results = prefill.run(self.graphs[id(prefill)], *call)
        rows = zip(results["keep"], results["valid"], strict=True)
        return Result([keep[valid.bool()] for keep, valid in rows], results["scores"], results["logits"])
