"""Tiny models of real architectures, from data: a config, and inputs whose values are given or drawn.

One JSON file describes one model; see `read`. Weights are random, and scaled so that a wrong position or a swapped
token moves the logits.
"""

import contextlib
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hawk_compile.errors import InputError
from hawk_compile.files import read_json
from hawk_compile.settings.closest import meant
from hawk_compile.tools.survey.outcome import Misdescribed, without_folders

FIELDS = {"model_type": str, "class": str, "config_class": str, "config": dict, "inputs": dict}
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        name: the file's, without its ending: the model type, and what is special of it behind a dot.
        model_type: of its config.
        modalities: what is pruned; None: images and videos.
        inputs: name -> values, or {"dtype", "shape", "low", "high"} to draw from; "rows" beside them is the dimension
            along which rows lie, 0 if it says nothing; see `prompt`.
        video_inputs: what its forward takes of a video for each row, as `inputs`; see `videos`.
        notes: what is special of it, in words.
    """

    name: str
    model_type: str
    model_class: str
    config_class: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    modalities: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    video_inputs: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Tiny:
    """Read a tiny model's description.

    Raises:
        InputError: the file holds something else.
    """
    held = read_json(path, InputError, "a tiny model must be described by a JSON file", MOST_BYTES)
    held = held if isinstance(held, dict) else {}
    if missing := [name for name, kind in FIELDS.items() if not isinstance(held.get(name), kind)]:
        raise InputError(
            f"{path} must describe a tiny model by {', '.join(FIELDS)}, and lacks {', '.join(missing)}, or has "
            "something else there: add what is missing, as docs/support.md says"
        )
    modalities, notes = held.get("modalities"), held.get("notes", [])
    return Tiny(
        path.stem, held["model_type"], held["class"], held["config_class"], held["config"], held["inputs"],
        None if modalities is None else tuple(modalities),
        (notes,) if isinstance(notes, str) else tuple(notes), held.get("video_inputs", {}),
    )  # fmt: skip


def build(tiny: Tiny, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, in eval mode.

    Raises:
        Misdescribed: transformers lacks a class, or the model does not run.
    """
    config_class: type[PretrainedConfig] = class_of("config_class", tiny.config_class)
    model_class: type[PreTrainedModel] = class_of("class", tiny.model_class)
    torch.manual_seed(seed)
    model = model_class(config_class(**tiny.config)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spread_weights(model)
    if not is_finite(model, prompt(tiny, rows=1)):
        model.load_state_dict(before)
    # A tiny vocabulary holds the end of a text every few tokens.
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


def class_of(field: str, name: str) -> Any:
    """A class of transformers that a field of the JSON names.

    Raises:
        Misdescribed: there is none.
    """
    if not hasattr(transformers, name):
        raise Misdescribed(
            f"`{field}` in the JSON names {name}, which transformers {transformers.__version__} does not "
            f"have{meant(name, dir(transformers))}"
        )
    return getattr(transformers, name)


def plain(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """What the model gives before anything is done to it.

    Raises:
        Misdescribed: its own error, and where in transformers.
    """
    try:
        with torch.no_grad():
            return model(**inputs)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if f"{os.sep}transformers{os.sep}" in frame.filename]
        models = [frame for frame in theirs if f"{os.sep}models{os.sep}" in frame.filename]
        where = (models or theirs or frames)[-1]
        raise Misdescribed(
            "the plain model fails on these inputs: correct the JSON "
            f"({type(error).__name__}: {error}; {without_folders(where.filename)}:{where.lineno})"
        ) from error


def spread_weights(model: PreTrainedModel) -> None:
    """Draw weights of which every layer passes on a signal of the size it got; norms and biases stay as they are."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                fan_in = parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()  # 3: experts
                parameter.normal_(0, fan_in**-0.5)
        with contextlib.suppress(NotImplementedError):  # of encoder-decoders without embeddings of their own
            if (embeddings := model.get_input_embeddings()) is not None:
                embeddings.weight.normal_(0, 1)  # type: ignore[union-attr, operator]


def is_finite(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    logits = getattr(plain(model, inputs), "logits", None)
    return logits is None or bool(logits.isfinite().all())


def prompt(tiny: Tiny, rows: int | Sequence[int], seed: int = 0) -> dict[str, Any]:
    """The inputs of some rows: pixels are drawn, everything else is as the file says.

    Args:
        rows: how many, or which ones.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: draw(value, generator) for name, value in tiny.inputs.items()}
    count = len(drawn["input_ids"])
    chosen = list(range(rows)) if isinstance(rows, int) else list(rows)
    return {
        name: rows_of(value, count, chosen, tiny.inputs[name].get("rows", 0) if isinstance(value, Tensor) else 0)
        for name, value in drawn.items()
    }


def draw(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, dict):
        return value
    if "python" in value:
        return value["python"]
    dtype = getattr(torch, value["dtype"])
    if "values" in value:
        return torch.tensor(value["values"], dtype=dtype)
    low, high = value["low"], value["high"]
    return (torch.rand(value["shape"], generator=generator) * (high - low) + low).to(dtype)


def rows_of(value: Any, count: int, chosen: list[int], dim: int = 0) -> Any:
    """The part of an input that belongs to the chosen rows of `count`: each has an equal share, in order."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[dim] % count:
        return value
    shares = value.split(value.shape[dim] // count, dim)
    return torch.cat([shares[row] for row in chosen], dim)
