"""Where a model was loaded from, which its configuration says; that of a part says nothing."""

import weakref

from torch import nn
from transformers import PreTrainedModel

wholes: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Parts that are optimised in place of a whole model -> where that was loaded from."""


def checkpoint_of(model: PreTrainedModel) -> str:
    """The folder or the name on the Hub that a model, or what it is a part of, was loaded from; '' if from none."""
    return str(getattr(model.config, "name_or_path", "") or wholes.get(model, ""))


def name_checkpoint(part: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Note of which model something is a part."""
    wholes[part] = checkpoint_of(whole)
