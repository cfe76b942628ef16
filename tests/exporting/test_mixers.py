"""Mixers as a scan: what the model's own function gives, of any length."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers.models.jamba import modeling_jamba
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.qwen3_5 import modeling_qwen3_5

from hawk_compile.capture import mixers
from hawk_compile.exporting.mixers import CHUNK, mixed_by_scan

FILES = (modeling_qwen3_5, modeling_nemotron_h, modeling_jamba)
LENGTHS = (1, 2 * CHUNK + 1)
ROWS, HEADS, WIDTH = 2, 2, 4


def delta_rule(length: int) -> tuple[str, dict[str, object]]:
    """(the function's path, its arguments)."""
    shape = (ROWS, length, HEADS, WIDTH)
    given = {name: torch.randn(shape) for name in ("query", "key", "value")}
    gates = {"g": logsigmoid(torch.randn(shape[:3])), "beta": torch.rand(shape[:3])}
    path = f"{modeling_qwen3_5.__name__}.torch_chunk_gated_delta_rule"
    return path, {**given, **gates, "output_final_state": True, "use_qk_l2norm_in_kernel": True}


def state_space(length: int) -> tuple[str, dict[str, object]]:
    """With a bias of its steps, so that rows of zeros are steps too."""
    given = {"hidden_states": torch.randn(ROWS, length, HEADS, WIDTH), "dt": torch.randn(ROWS, length, HEADS)}
    given |= {name: torch.randn(ROWS, length, HEADS, WIDTH) for name in ("B", "C")}
    weights = {"A": -torch.rand(HEADS), "D": torch.rand(HEADS), "dt_bias": torch.rand(HEADS)}
    path = f"{modeling_nemotron_h.__name__}.mamba2_chunk_scan"
    return path, {**given, **weights, "chunk_size": 8, "dt_softplus": True, "return_final_states": True}


def selective_scan(length: int) -> tuple[str, dict[str, object]]:
    given = {name: torch.randn(ROWS, HEADS, length) for name in ("hidden_states", "dt", "z")}
    weights = {"A": -torch.rand(HEADS, WIDTH), "D": torch.rand(HEADS), "delta_bias": torch.rand(HEADS)}
    given |= {name: torch.randn(ROWS, WIDTH, length) for name in ("B", "C")}
    path = f"{modeling_jamba.__name__}.mamba_selective_scan"
    return path, {**given, **weights, "delta_softplus": True, "return_last_state": True}


@pytest.mark.parametrize("mixer", [delta_rule, selective_scan, pytest.param(state_space, marks=pytest.mark.slow)])
def test_a_scan_gives_what_the_function_gives(mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for length in LENGTHS:
        path, arguments = mixer(length)
        file, _, name = path.rpartition(".")
        function = getattr({each.__name__: each for each in FILES}[file], name)
        monkeypatch.setitem(mixers.originals, path, mixers.originals.get(path, function))
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        values = tuple(mixers.TENSOR if isinstance(value, torch.Tensor) else value for value in arguments.values())
        with torch.no_grad():
            expected = function(**arguments)
            found = mixed_by_scan(tensors, mixers.name_of_call(path, tuple(arguments), values))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
