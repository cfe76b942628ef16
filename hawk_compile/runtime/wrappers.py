"""Modules that are no transformers model and hold one: a wrapper of PEFT, DistributedDataParallel, torch.compile, one's
own. Whatever is asked of such a module is asked of the model inside."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import takes
from hawk_compile.errors import HawkError, UnsupportedModelError
from hawk_compile.runtime.state import PART, RUNTIME
from hawk_compile.runtime.wholes import whole_part
from hawk_compile.settings.config import MODALITIES

GIVE = "give the model that AutoModelForImageTextToText.from_pretrained returns, or what holds exactly one such model"


def is_wrapper(module: Any) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, PreTrainedModel)


def outermost(module: nn.Module, path: str = "model") -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models that a module holds and that lie in no other: (path, itself)."""
    for name, child in module.named_children():
        if isinstance(child, PreTrainedModel):
            yield f"{path}.{name}", child
        else:
            yield from outermost(child, f"{path}.{name}")


def model_to_prune(module: nn.Module) -> PreTrainedModel:
    """The model that is optimised where a wrapper is given: the only one in it that takes images, videos or audio, or
    the only one at all.

    Raises:
        UnsupportedModelError: there is none, or there are several; or the wrapper runs copies of it.
    """
    refuse_copies(module)
    first: dict[int, tuple[str, PreTrainedModel]] = {}
    for path, model in outermost(module):
        first.setdefault(id(model), (path, model))
    every = [*first.values()]
    name = type(module).__name__
    if not every:
        raise UnsupportedModelError(
            f"model must be a transformers.PreTrainedModel or hold one, got {name}, which holds none: {GIVE}"
        )
    seeing = [(path, model) for path, model in every if sees(model)] or every
    if len(seeing) > 1:
        paths = " or ".join(path for path, _ in seeing)
        raise UnsupportedModelError(
            f"model must be a transformers.PreTrainedModel or hold exactly one that can be pruned, got {name}, which "
            f"holds {len(seeing)}: give {paths}"
        )
    return seeing[0][1]


def sees(model: PreTrainedModel) -> bool:
    return whole_part(model) is not None or any(takes(model, modality) for modality in MODALITIES)


def refuse_copies(module: nn.Module) -> None:
    """Refuse a DataParallel over several devices, which copies its model to each of them anew at every call.

    Raises:
        UnsupportedModelError: as said.
    """
    for part in module.modules():
        if isinstance(part, nn.DataParallel) and len(part.device_ids) > 1:
            raise UnsupportedModelError(
                f"nn.DataParallel copies its model to {len(part.device_ids)} devices at every call, and each copy "
                "would have to be compiled anew: run a process for each device (torchrun, DistributedDataParallel), or "
                f"give DataParallel one device, got device_ids={[*part.device_ids]}"
            )


def optimised_in(module: nn.Module) -> list[PreTrainedModel]:
    """The optimised models that a wrapper holds."""
    held = {id(model): model for _, model in outermost(module) if {RUNTIME, PART} & vars(model).keys()}
    return [*held.values()]


def optimised_model(module: nn.Module) -> Any:
    """The optimised model of which a wrapper is asked something; the wrapper itself where it holds none.

    Raises:
        HawkError: it holds several.
    """
    models = optimised_in(module)
    if len(models) > 1:
        raise HawkError(
            f"report needs one optimised model, and {type(module).__name__} holds {len(models)}: give the one that is "
            "meant"
        )
    return models[0] if models else module
