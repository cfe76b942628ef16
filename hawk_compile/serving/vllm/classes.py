"""The classes by which checkpoints are served pruned, by the name of the one that vLLM has for them.

hawk_compile.serving.vllm.classes:PrunedQwen2VLForConditionalGeneration     made when it is asked for
"""

import functools

from hawk_compile.serving.vllm.compat.processor import give_processor
from hawk_compile.serving.vllm.model import pruned_class
from hawk_compile.serving.vllm.processor import pruned

PREFIX = "Pruned"


def made(architecture: str) -> type:
    """The class for an architecture of vLLM's registry."""
    from vllm.model_executor.models.registry import ModelRegistry

    base = ModelRegistry.models[architecture].load_model_cls()
    served = pruned_class(base)
    give_processor(served, base, functools.partial(pruned, served))
    return served


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    globals()[name] = made(name.removeprefix(PREFIX))
    return globals()[name]
