"""The arguments with which a prefill is captured, as the runtime makes them of a model's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hawk_compile

Call = tuple[dict[str, Any], torch.Tensor | None, tuple[Any, ...]]


class Recorded(Exception):
    """Ends a prefill where its graph would run."""


def call_of(model: Any, inputs: dict[str, Any], **settings: Any) -> Call:
    """(inputs, past mask, plan) of a model's prefill; nothing is captured. The model is left as it was.

    Args:
        settings: of `HawkConfig`.
    """
    calls: list[Call] = []

    def record(before_capture: Any, forward: Any, given: Any, past_mask: Any, planned: Any, along: Any) -> Any:
        calls.append((given, past_mask, planned))
        raise Recorded

    hawk_compile.optimize(model, **{"backend": "eager", **settings})
    prefill = model.__dict__["_hawk_runtime"].prefill
    prefill.called = record
    try:
        with pytest.raises(Recorded):
            model(**inputs)
    finally:
        del prefill.called
        hawk_compile.restore(model)
    return calls[0]
