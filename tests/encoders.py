"""Encoders of images that are watched."""

import functools
from collections.abc import Callable
from typing import Any

import pytest


def at_each_encoding(monkeypatch: pytest.MonkeyPatch, model: Any, note: Callable[[], Any]) -> None:
    """Call `note` before each call of the encoder of images that a model's class has."""
    kind = type(model.base_model)
    method = kind.get_image_features

    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    monkeypatch.setattr(kind, "get_image_features", noted)
