"""timm, which some models' encoders are made of, where a test can have it."""

from __future__ import annotations

import importlib
import importlib.util

import torch

MISSING_OPERATORS = ("nms", "qnms")
"""torchvision's, which it describes on import; a build for CUDA does not bring them where torch has none."""
DECLARED: list[torch.library.Library] = []
"""What is declared lasts as long as this is held."""


def reason() -> str:
    """Why timm cannot be used here; '' if it can."""
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install --target FOLDER timm torchvision, and put FOLDER on the path"
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        declare_operators()
        importlib.import_module("torchvision")
    importlib.import_module("timm")
    return ""


def declare_operators() -> None:
    if DECLARED:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in MISSING_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    DECLARED.append(library)
