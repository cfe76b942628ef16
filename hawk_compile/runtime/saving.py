"""Head weights beside a saved checkpoint, so that it prunes alike wherever and under whatever name it is loaded."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hawk_compile.compat.models import UPLOAD
from hawk_compile.files import write_whole
from hawk_compile.runtime.originals import looks_like, original
from hawk_compile.runtime.state import RUNTIME, holder
from hawk_compile.settings.head_weights import FILE_NAME, resolve


@functools.cache
def save_of(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """save_pretrained, with the head weights in use beside the checkpoint."""

    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        result = original(self, "save_pretrained")(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_head_weights(save_directory, self)
        return result

    return looks_like(save_pretrained, kind.save_pretrained)


def upload(self: PreTrainedModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """What sends a saved folder to the Hub, in the middle of save_pretrained; the head weights go with it."""
    write_head_weights(working_dir, self)
    return original(self, UPLOAD)(working_dir, *args, **kwargs)


def write_head_weights(folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write the weights in use, equal ones too: weights that were published for a name, or lay beside the old folder,
    are not looked for once these are there. Where the selector fixes its own, those that `head_weights` asks for.
    Nothing of a model that was restored.
    """
    model = holder(model)
    runtime = model.__dict__.get(RUNTIME)
    if runtime is None:
        return
    config = runtime.config
    weights = resolve(config.head_weights, model) if config.method.head_weights else runtime.head_weights
    content = {"weights": weights.values.tolist(), "origin": weights.origin}
    write_whole(Path(folder) / FILE_NAME, json.dumps(content, indent=1) + "\n")
