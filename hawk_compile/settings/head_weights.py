"""Where the importance of each query head comes from.

HAWK weights the heads of the scoring layer by an importance measured offline (arXiv 2604.07812). Only proportions
matter: weights are divided by their sum.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.errors import HeadWeightsError
from hawk_compile.files import open_regular, read_json, shown
from hawk_compile.settings.checkpoint import checkpoint_of

FILE_NAME = "head_weights.json"
"""A checkpoint folder may hold its weights under this name; the package holds the published ones under it too."""
MOST_HEADS = 1 << 16
"""Of a layer: no file of weights for more is read."""


@dataclass(frozen=True)
class HeadWeights:
    """Weights [H] float32 that sum to 1, and where they came from."""

    values: Tensor
    origin: str


def resolve(setting: Any, model: PreTrainedModel) -> HeadWeights:
    """The weights for a model.

    Args:
        setting: "auto", "uniform", a path, a Hub id, a tensor or a sequence of numbers; see `HawkConfig.head_weights`.

    Raises:
        HeadWeightsError: a file that holds no weights, a Hub repository without one, or weights of the wrong length,
            negative, all zero or not finite.
    """
    return weights_for(setting, model.config.get_text_config().num_attention_heads, checkpoint_of(model))


def weights_for(setting: Any, heads: int, checkpoint: str) -> HeadWeights:
    """The weights for a layer of `heads` query heads; `checkpoint` is its folder or its repository, or ""."""
    if isinstance(setting, str) and setting in ("auto", "uniform"):
        known = automatic(checkpoint) if setting == "auto" else None
        if known and len(known[0]) == heads:
            return normalised(*known, heads)
        unfit = f" ({len(known[0])} weights, {known[1]}, do not fit {heads} heads)" if known else ""
        return HeadWeights(torch.full((heads,), 1.0 / heads, device="cpu"), f"uniform{unfit}")
    return normalised(*named_or_numbers(setting), heads)


def explicit_weights(setting: Any) -> Tensor | None:
    """Weights that need no model to be known; None for "auto" and "uniform"."""
    if isinstance(setting, str) and setting in ("auto", "uniform"):
        return None
    values, origin = named_or_numbers(setting)
    return normalised(values, origin, len(values)).values


def named_or_numbers(setting: Any) -> tuple[Tensor, str]:
    """Weights of a file or a Hub repository that is named, or numbers, and where they came from."""
    if isinstance(setting, str) and is_hub_id(setting):
        return read(fetched(setting)), f"Hub {setting}"
    if isinstance(setting, (str, os.PathLike)):
        return read(Path(setting)), f"file {os.fspath(setting)}"
    return as_tensor(setting), "given"


def is_hub_id(name: str) -> bool:
    """Whether a string is `org/name` or `org/name@revision`: nothing that exists here, nor what looks like a path."""
    looks_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@.+)?", name) and not name.endswith((".json", ".safetensors"))
    return bool(looks_so) and not os.path.lexists(name)


def fetched(hub_id: str) -> Path:
    """The head weights of a Hub repository, in the Hub's cache.

    Raises:
        HeadWeightsError: what the Hub does not have, or a Hub that cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repository, FILE_NAME, revision=revision or None))
    except Exception as error:  # of the Hub's, of its HTTP library's, of the file system's: they have no other base
        known = {
            errors.LocalEntryNotFoundError: "the Hub cannot be reached and the file is not in its cache: connect, or "
            "give a file",
            errors.EntryNotFoundError: f"it holds no {FILE_NAME}: give a repository that does, or a file",
            errors.GatedRepoError: "access to it is granted on request: ask there and log in (hf auth login), or give "
            "a file",
            errors.RepositoryNotFoundError: "there is none of this name, or it is private: correct the name, log in "
            "(hf auth login), or give a file",
            errors.RevisionNotFoundError: f"it has no revision {revision}: correct it",
        }
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        why_and_remedy = next((text for kind, text in known.items() if isinstance(error, kind)), None)
        why_and_remedy = why_and_remedy or f"fetching it failed ({told}): try again, or give a file"
        raise HeadWeightsError(
            f'head_weights names no file here, so it must be a Hugging Face Hub repository with {FILE_NAME}; got '
            f'"{hub_id}", and {why_and_remedy}'
        ) from None


def automatic(name: str) -> tuple[Tensor, str] | None:
    """Weights that lie beside the checkpoint of this name, or that were published for it."""
    beside = Path(name) / FILE_NAME
    if name and os.path.lexists(beside):
        return read(beside), f"beside the checkpoint ({beside})"
    entry = published().get(name.rstrip("/").rsplit("/", 1)[-1].lower())
    return (torch.tensor(entry["weights"], device="cpu"), f"published ({entry['source']})") if entry else None


@cache
def published() -> dict[str, Any]:
    text = resources.files("hawk_compile.settings").joinpath(FILE_NAME).read_text(encoding="utf-8")
    return json.loads(text)


def read(path: Path) -> Tensor:
    """Weights from a JSON file (a list, or an object with "weights") or a safetensors file (tensor "weights")."""
    rule = "head_weights must be a JSON or safetensors file of one number per query head"
    remedy = "give a list of them, or {\"weights\": [...]}"
    if path.suffix == ".safetensors":
        return read_tensor(path, rule)
    content = read_json(path, HeadWeightsError, rule)
    if isinstance(content, dict):
        if "weights" not in content:
            raise HeadWeightsError(f'{rule}; the object in {shown(path)} has no "weights": {remedy}')
        content = content["weights"]
    if not isinstance(content, list) or not all(type(weight) in (int, float) for weight in content):
        raise HeadWeightsError(
            f"{rule}; {shown(path)} holds {shown(repr(content), 80)}, which is no list of numbers: {remedy}"
        )
    return as_tensor(content)


def read_tensor(path: Path, rule: str) -> Tensor:
    """The tensor "weights" of a safetensors file, of which nothing else is read."""
    from safetensors import SafetensorError, safe_open

    os.close(open_regular(path, HeadWeightsError, rule))
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "weights" not in names:
                there = ", ".join(sorted(names)) or "nothing"
                raise HeadWeightsError(
                    f"{rule}; {shown(path)} holds no tensor 'weights' but {shown(there)}: save them under that name"
                )
            part = file.get_slice("weights")
            shape, dtype = part.get_shape(), part.get_dtype()
            if len(shape) != 1 or shape[0] > MOST_HEADS or not dtype.startswith(("F", "BF", "I", "U")):
                raise HeadWeightsError(
                    f"{rule}; the tensor 'weights' of {shown(path)} is {dtype} of shape {shape}: save numbers of shape "
                    "[H]"
                )
            return as_tensor(file.get_tensor("weights"))
    except HeadWeightsError:
        raise
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        # Of the header, of what it says of the file, of types of numbers that torch does not have.
        raise HeadWeightsError(
            f"{rule}; {shown(path)} is not a safetensors file: {shown(str(error), 200)}; give another file"
        ) from None


def as_tensor(weights: Any) -> Tensor:
    if isinstance(weights, Tensor):
        if weights.ndim != 1:
            raise HeadWeightsError(
                f"head_weights must have shape [H], one weight for each query head; got shape {tuple(weights.shape)}: "
                "give a tensor of one dimension"
            )
        return weights.detach().to("cpu", torch.float32)
    numbers = isinstance(weights, Sequence) and all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights
    )
    if not numbers or isinstance(weights, str):
        kind = type(weights).__name__
        raise HeadWeightsError(
            f'head_weights must be "auto", "uniform", a Hub id, a path, a tensor or numbers, got {kind}: give '
            "one of these"
        )
    try:
        return torch.tensor([float(weight) for weight in weights], dtype=torch.float32, device="cpu")
    except OverflowError:
        raise HeadWeightsError(
            "head_weights must be finite numbers, got one that no float holds: give smaller ones"
        ) from None


def normalised(values: Tensor, origin: str, heads: int) -> HeadWeights:
    """Checked and divided by their sum."""
    rule = f"head_weights must be {heads} finite numbers >= 0, one for each query head, not all 0"
    if len(values) != heads:
        raise HeadWeightsError(f"{rule}; got shape {tuple(values.shape)} ({origin}): give {heads}")
    if not values.isfinite().all():
        raise HeadWeightsError(f"{rule}; got {shown(str(values.tolist()))} ({origin}): replace what is not finite")
    if (values < 0).any():
        raise HeadWeightsError(
            f"{rule}; got the negative weight {values.min().item():g} ({origin}): give 0 to a head that has no say"
        )
    if not values.any():
        raise HeadWeightsError(f'{rule}; all are 0 ({origin}); "uniform" weighs all heads equally')
    total = values.sum()
    if not total.isfinite() or total < torch.finfo(torch.float32).tiny:  # of finite numbers whose sum is not to be had
        values = values.double() / values.double().sum()
        return HeadWeights(values.float(), origin)
    return HeadWeights(values / total, origin)
