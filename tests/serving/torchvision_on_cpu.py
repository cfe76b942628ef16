"""Lets torchvision of PyPI, whose compiled half links CUDA, be imported beside a torch for CPUs: on test machines only.

vLLM's processors import its Python half, which asks for the schemas of two operators of the other half when it is
imported, and runs neither.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = ("nms", "qnms")
declared: list[Any] = []


class Declare(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first asked for, and finds nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.append(library)


sys.meta_path.insert(0, Declare())
