"""What the plugin does in a vLLM that it does not know."""

from __future__ import annotations

import logging

import pytest

from hawk_compile.serving.vllm import plugin


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
