"""The table of the serving page names every multimodal class of vLLM's registry, once."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.serving.registry import ROWS, table, wrong

PAGE = Path(__file__).parents[2] / "docs/serving.md"


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text()


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm")
def test_it_names_what_the_registry_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong() == []
    monkeypatch.setattr("tests.serving.registry.ROWS", (*ROWS[1:], ROWS[1]))
    assert {"Qwen2VL", ROWS[1].names.split()[0]} <= set(wrong()), "missing, and named twice"
