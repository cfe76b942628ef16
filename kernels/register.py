"""How the operators that have a Triton kernel are registered."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

LOG = logging.getLogger("torch._library.triton")


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op`, quiet where there is no Triton, of which torch would warn at every operator."""

    def register(definition: Callable[..., Any]) -> Any:
        level = LOG.level
        if find_spec("triton") is None:
            LOG.setLevel(logging.ERROR)
        try:
            return torch.library.triton_op(name, mutates_args={})(definition)
        finally:
            LOG.setLevel(level)

    return register
