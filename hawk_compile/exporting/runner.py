"""`load`: an exported folder as something that generates, by transformers' own `generate` around the exported graphs.

A skeleton of the model is made from its configuration, without weights; its prefill, its decode step and the modules of
its encoder are then the exported components. What models do between them in Python (positions, packing of tiles) is
their own code, and what surrounds a pruned prefill (lengths, masks, caches) is that of an optimised model.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from hawk_compile.errors import HawkError, InputError, ManifestError, UnsupportedCallError
from hawk_compile.exporting import manifest as manifests
from hawk_compile.exporting.calls import (
    ExportedPrefill,
    Session,
    decode_call,
    encoder_call,
    refuse_caches,
    refuse_hidden,
)
from hawk_compile.exporting.components import DECODE, PREFILL
from hawk_compile.exporting.formats import target_of
from hawk_compile.exporting.manifest import FILE_NAME, Manifest, Part, chat_of_manifest, config_of
from hawk_compile.exporting.write import HOST_WEIGHTS
from hawk_compile.files import path_of, shown
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.runtime.api import report
from hawk_compile.runtime.handover import scratch_cache, scratch_layers
from hawk_compile.runtime.overrides import overrides_of
from hawk_compile.runtime.records import Report
from hawk_compile.runtime.state import RUNTIME, Runtime
from hawk_compile.settings.checkpoint import kernel_of_hub
from hawk_compile.settings.head_weights import HeadWeights, normalised

MOST_LAYERS = 4096


class Runner:
    """An exported model. Its `generate` is called as that of the model it was exported from, by any number of threads.

    Attributes:
        manifest: what was exported, and how.
    """

    def __init__(self, manifest: Manifest, model: PreTrainedModel, runtime: Runtime):
        self.manifest = manifest
        self.model: Any = model
        self.runtime = runtime

    def generate(self, *args: Any, ratio: float | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`: greedy, sampling, beams, streaming, batches.

        Args:
            ratio: fraction of visual tokens removed in this request, in [0, 1); None: that of the manifest.

        Raises:
            ConfigError: a ratio out of range.
            UnsupportedCallError: a call that an exported model does not support, such as another kind of cache.
            InputError: inputs that contradict each other or do not fit the exported components.
        """
        refuse_hidden(kwargs)
        refuse_caches(kwargs)
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = scratch_cache(None, scratch_layers(self.model))
        settings = self.runtime.settings
        with self.runtime.asking(settings if ratio is None else replace(settings, ratio=ratio)):
            return self.model.generate(*args, **kwargs)

    def report(self, source: Any = None) -> Report:
        """What the last prefill did, or that of an output or a cache; see `hawk_compile.report`."""
        return report(self.model if source is None else source)


def load(path: str | os.PathLike[str]) -> Runner:
    """Open an exported folder in the runtime that its manifest names.

    A folder is as trusted as a program: a package of AOTInductor is compiled code, which is loaded and run, and the
    other formats' runtimes were not made for files of strangers.

    Raises:
        ManifestError: no export, or files that are not those that were written, or that their runtime cannot open.
        ExportError: a package that the format needs is not installed.
    """
    folder = path_of(path, "path")
    manifest = manifests.read(folder)
    target = target_of(manifest.format, to_write=False)
    # Compiled packages run where their model was; the other sessions take and give tensors of the host.
    device = torch.device(manifest.device if manifest.format == "aoti" else "cpu")
    model = skeleton(folder, manifest, device)
    sessions = {name: checked(part, opened(target, folder, part), device) for name, part in manifest.parts.items()}
    for name in manifest.encoders:
        child = encoder_named(model, name)
        child.forward = encoder_call(child, sessions[name], manifest.parts[name])  # type: ignore[method-assign]
    config = config_of(manifest)
    weights = HeadWeights(torch.tensor(manifest.head_weights), manifest.head_weights_origin)
    normalised(weights.values, FILE_NAME, len(weights.values))  # to see that they are weights
    ids = SpecialIds(*(tuple(manifest.ids[name]) for name in ("vision_end", "end_of_turn", "special")))
    decode = decode_call(model, sessions[DECODE], manifest.parts[DECODE])
    runtime = Runtime(config, weights, ids, {"forward": decode})
    runtime.chat, runtime.chat_known = chat_of_manifest(manifest), True
    runtime.prefill = ExportedPrefill(model, sessions[PREFILL], manifest.parts[PREFILL])  # type: ignore[assignment]
    for name, (owner, method) in overrides_of(model).items():
        owner.__dict__[name] = method
    model.__dict__[RUNTIME] = runtime
    return Runner(manifest, model, runtime)


def opened(target: Any, folder: Path, part: Part) -> Session:
    """A component in its runtime.

    Raises:
        ManifestError: the runtime cannot open it, whatever it says.
    """
    try:
        return target.open_session(folder, part.file, part)  # type: ignore[no-any-return]
    except HawkError:
        raise
    except Exception as error:
        raise ManifestError(
            f"{part.file} of {folder} cannot be opened ({type(error).__name__}: {shown(str(error), 300)}): copy the "
            "folder again, or export again"
        ) from error


def encoder_named(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.base_model.get_submodule(name)  # type: ignore[return-value]
    except AttributeError:
        raise ManifestError(
            f"{FILE_NAME} names an encoder {shown(name, 80)}, which {type(model).__name__} does not have: export again"
        ) from None


def skeleton(folder: Path, manifest: Manifest, device: torch.device) -> PreTrainedModel:
    """The model without weights, but for the few parameters that its own code reads on the host.

    Raises:
        ManifestError: configurations that make no model, or another one.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_config(folder, config)
        with torch.device("meta"):
            model = made_of(config, dtype=getattr(torch, manifest.dtype))
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except HawkError:
        raise
    except Exception as error:  # of transformers', which checks little of what a configuration says
        raise ManifestError(
            f"config.json or generation_config.json of {folder} make no model ({type(error).__name__}: "
            f"{shown(str(error), 300)}): export again"
        ) from error
    if type(model).__name__ != manifest.model:
        raise ManifestError(
            f"{folder} was exported from {shown(manifest.model, 80)}, but its config.json makes {type(model).__name__}"
            ": copy the folder again, or export again"
        )
    model.generation_config = settings
    model.generation_config.cache_implementation = None
    model.generation_config.use_cache = True
    model.requires_grad_(False).eval()
    if HOST_WEIGHTS in manifest.files:
        put_weights(model, folder / HOST_WEIGHTS, device)
    kind: Any = type(model)
    model.__class__ = without_weights(kind, device)
    return model


def check_config(folder: Path, config: PretrainedConfig) -> None:
    """Refuse a configuration that has transformers fetch a kernel from the Hub, which is code, or that makes of a
    folder more layers than a model has, each of which is made of Python's objects."""
    if (attention := kernel_of_hub(config)) is not None:
        raise ManifestError(
            f"config.json of {folder} names the attention {shown(attention, 80)} of the Hub, which an export does not "
            "need: do not load it"
        )
    for name, value in numbers_of(config.to_dict()):
        if value > MOST_LAYERS and ("layer" in name or "depth" in name):
            raise ManifestError(f"config.json of {folder} has {name}={value}, more than {MOST_LAYERS}: export again")


def numbers_of(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and of those within it, by name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers_of(value)
        elif isinstance(value, int):
            yield str(name), value


def put_weights(model: PreTrainedModel, path: Path, device: torch.device) -> None:
    """Parameters of the model's body itself, in the place of those that it has."""
    own = dict(model.base_model.named_parameters(recurse=False))
    try:
        tensors = load_file(path)
    except Exception as error:  # of its header, or of types of numbers that torch does not have
        raise ManifestError(f"{path} is no safetensors file ({shown(str(error))}): export again") from None
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            raise ManifestError(
                f"{path} holds {shown(name, 80)} {list(value.shape)}, which is no parameter of "
                f"{type(model.base_model).__name__}: export again"
            )
        setattr(model.base_model, name, nn.Parameter(value.to(device), requires_grad=False))


def made_of(config: Any, **settings: Any) -> PreTrainedModel:
    """The model of a configuration, for images or for audio alone."""
    try:
        return AutoModelForImageTextToText.from_config(config, **settings)
    except ValueError:  # it has none for images
        return AutoModelForMultimodalLM.from_config(config, **settings)


@functools.cache
def without_weights(kind: type[PreTrainedModel], device: torch.device) -> type[PreTrainedModel]:
    """A class whose models are on a device by what they say: they have no weight there. One for all folders, since
    what an optimised model shadows is made for a class and kept."""
    return type(kind.__name__, (kind,), {"device": device})


def checked(part: Part, session: Session, device: torch.device) -> Session:
    """The session behind a check of its inputs, which says what was expected."""
    expected = {each.name: each for each in part.inputs}

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if inputs.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - inputs.keys()), sorted(inputs.keys() - expected.keys())
            raise UnsupportedCallError(
                f"{part.name} was exported with the inputs {', '.join(expected)}; this call lacks {missing or 'none'} "
                f"and also gives {unknown or 'none'}: call it as at export, or export again with such a prompt"
            )
        sizes: dict[str, int] = {}
        for name, given in inputs.items():
            wanted = expected[name].shape
            fits = len(wanted) == given.ndim and all(
                size == (one if isinstance(one, int) else sizes.setdefault(one, size))
                for one, size in zip(wanted, given.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{name} of {part.name} must have shape {wanted}, got {list(given.shape)} (sizes: {sizes}): "
                    "give what the model's processor returns"
                )
        for name, least in part.least.items():
            if sizes.get(name, least) < least:
                raise InputError(f"{part.name} was exported for {name} from {least} on, got {sizes[name]}: give more")
        return session(
            {
                name: given.to(device, getattr(torch, expected[name].dtype)).contiguous()
                for name, given in inputs.items()
            }
        )

    return run
