"""Head weights beside a saved checkpoint, so that it prunes alike wherever and under whatever name it is loaded."""

import json
import os
from pathlib import Path

from transformers import PreTrainedModel

from hawk_compile.runtime.state import Runtime
from hawk_compile.settings.head_weights import FILE_NAME, resolve


def write_head_weights(folder: str | os.PathLike[str], model: PreTrainedModel, runtime: Runtime) -> None:
    """Write the weights in use, equal ones too: weights that were published for a name, or lay beside the old folder,
    are not looked for once these are there. Where the selector fixes its own, those that `head_weights` asks for.
    """
    config = runtime.config
    weights = resolve(config.head_weights, model) if config.method.head_weights else runtime.head_weights
    content = {"weights": weights.values.tolist(), "origin": weights.origin}
    (Path(folder) / FILE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
