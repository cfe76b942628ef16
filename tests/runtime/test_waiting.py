"""When a prefill waits for the device: once, for ids and padding, before its encoders have begun."""

from typing import Any

import pytest

from hawk_compile.plan.plan import on_host
from hawk_compile.runtime import inputs, prefill
from tests import zoo
from tests.encoders import at_each_encoding
from tests.runtime.models import fresh, prompt


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_ids_are_read_before_images_are_encoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = fresh(name), []

    def read(*args: Any) -> Any:
        done.append("read")
        return on_host(*args)

    for module in (inputs, prefill):
        monkeypatch.setattr(module, "on_host", read)
    at_each_encoding(monkeypatch, model, lambda: done.append("encoded"))
    model(**prompt(name, *zoo.sizes(name)[:2]))
    assert done == ["read", "encoded"]
