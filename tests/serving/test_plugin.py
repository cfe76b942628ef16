"""What the plugin does in a vLLM that it does not know, and which engines it refuses."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hawk_compile.errors import UnsupportedCallError
from hawk_compile.serving.vllm import plugin
from hawk_compile.serving.vllm.compat.engine import check_engine


@pytest.mark.parametrize("error", [ImportError("no module named vllm.config"), AttributeError("no such method")])
def test_a_vllm_without_what_it_needs_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that never asked for pruning starts as before; one that did says in its log that it is off."""

    def fail(call: object) -> bool:
        raise error

    monkeypatch.setattr(plugin, "when_verified", fail)
    with caplog.at_level(logging.ERROR, "vllm.hawk"):
        plugin.register()
    assert "nothing is pruned" in caplog.text and str(error) in caplog.text


def an_engine(stages: int = 1, encoder_only: bool = False, transfer: Any = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages), ec_transfer_config=transfer,
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_encoder_only=encoder_only)),
    )  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [
    ({"stages": 2}, "pipeline_parallel_size=2 .* take tensor_parallel_size"),
    ({"encoder_only": True}, "the vision encoder alone"),
    ({"transfer": object()}, "the vision encoder alone"),
])  # fmt: skip
def test_engines_that_are_refused(given: dict[str, Any], message: str) -> None:
    check_engine(an_engine())
    with pytest.raises(UnsupportedCallError, match=message):
        check_engine(an_engine(**given))
