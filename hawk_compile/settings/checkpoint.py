"""What a checkpoint's configuration says: where a model was loaded from (that of a part says nothing), and code."""

import weakref

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hawk_compile.compat.models import attention_of

wholes: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Parts that are optimised in place of a whole model -> where that was loaded from."""


def checkpoint_of(model: PreTrainedModel) -> str:
    """The folder or the name on the Hub that a model, or what it is a part of, was loaded from; '' if from none."""
    return str(getattr(model.config, "name_or_path", "") or wholes.get(model, ""))


def name_checkpoint(part: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Note of which model something is a part."""
    wholes[part] = checkpoint_of(whole)


def kernel_of_hub(config: PretrainedConfig) -> str | None:
    """The attention by which a configuration, or one within it, makes transformers fetch code; None: none."""
    if "/" in (attention := str(attention_of(config))):
        return attention
    within = [held for held in vars(config).values() if isinstance(held, PretrainedConfig)]
    return next((kernel for kernel in map(kernel_of_hub, within) if kernel is not None), None)
