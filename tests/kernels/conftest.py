from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.kernels.launching import Interpreter, launch_on_cuda


@pytest.fixture(scope="session")
def device() -> str:
    """Where the operators run: "cuda" where there is one, so that the same checks reach the compiled kernels."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def launch(device: str) -> Iterator[Callable[..., Any]]:
    """`launch("score.launch_folded", *arguments)`: a kernel launcher, on CUDA or under Triton's interpreter."""
    if device == "cuda":
        yield launch_on_cuda
        return
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
