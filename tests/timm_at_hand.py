"""timm, which some models' encoders are made of, where a test can have it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

MISSING_OPERATORS = ("nms", "qnms")
"""torchvision's, which it describes on import; a build for CUDA does not bring them where torch has none."""
DECLARED: list[Any] = []
"""The library of what is declared, which lasts as long as this is held."""


def reason() -> str:
    """Why timm cannot be used here; '' if it can."""
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install --target FOLDER timm torchvision, and put FOLDER on the path"
    return ""


def declare_operators() -> None:
    """Let a torchvision that is installed be imported, before transformers does: it would fail with it."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in MISSING_OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)
