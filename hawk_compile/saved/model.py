"""The optimised model whose compiled prefill is saved or loaded."""

from typing import Any

from torch import nn

from hawk_compile.errors import InputError
from hawk_compile.runtime.split import device_of_graph
from hawk_compile.runtime.state import RUNTIME, Runtime, holder
from hawk_compile.runtime.wrappers import is_wrapper, optimised_model

BACKEND = "inductor"


def optimised(model: Any, what: str) -> tuple[Any, Runtime]:
    """(the model itself, what it carries).

    Args:
        what: the function that is given it.

    Raises:
        InputError: it is not optimised, or not on a CPU; or another backend compiles it.
    """
    inner = holder(optimised_model(model) if is_wrapper(model) else model) if isinstance(model, nn.Module) else None
    runtime = None if inner is None else inner.__dict__.get(RUNTIME)
    if inner is None or runtime is None:
        raise InputError(
            f"{what} takes an optimised model, got {type(model).__name__}: call hawk_compile.optimize first"
        )
    if (device := device_of_graph(inner).type) != "cpu":
        raise InputError(
            f"{what} takes models on a CPU, for which alone it was tried, got one on {device}: leave it out there, and "
            "keep the compiler's cache (TORCHINDUCTOR_CACHE_DIR) instead"
        )
    if runtime.ranks is not None:
        raise InputError(f"{what} takes a model that no other process shares, got a tensor-parallel one: leave it out")
    if runtime.prefill.config.backend != BACKEND:
        raise InputError(
            f'{what} takes a model that backend="{BACKEND}" compiles, got backend="{runtime.prefill.config.backend}": '
            f'call optimize with backend="{BACKEND}"'
        )
    return inner, runtime
