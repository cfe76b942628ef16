"""`export`: a model's components, pruned, written in one format with a manifest; all of it or nothing."""

import importlib.metadata
import os
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.dynamo import capture_lock
from hawk_compile.capture.modalities import (
    AUDIO,
    encodes_audio_itself,
    merges_itself,
    modalities_of,
    placeholder_ids,
    raw_modalities,
)
from hawk_compile.errors import ExportError, InputError
from hawk_compile.exporting.caches import check_cache, check_window
from hawk_compile.exporting.components import DECODE, PREFILL, Component
from hawk_compile.exporting.decode import decode_component
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.exporting.folder import written_whole
from hawk_compile.exporting.formats import check_dtype, target_of
from hawk_compile.exporting.manifest import Manifest, Part, file_digest
from hawk_compile.exporting.parts import write_parts
from hawk_compile.exporting.plain_weights import check_weights
from hawk_compile.exporting.prefill import prefill_component, prune
from hawk_compile.exporting.settings import settings_of
from hawk_compile.files import path_of
from hawk_compile.plan.chat import Chat
from hawk_compile.plan.ids import special_ids
from hawk_compile.plan.template import chat_of, chat_of_settings
from hawk_compile.progress import Listener, nobody
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.parts import text_part
from hawk_compile.runtime.wholes import pruned_part
from hawk_compile.settings.checkpoint import checkpoint_of
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import HeadWeights, resolve
from hawk_compile.versions import check_exporters

OWN_PACKAGES = ("hawk-compile", "torch", "transformers")
HOST_WEIGHTS = "host.safetensors"
"""Parameters of the model's body itself (as a newline between rows of tiles), which packing on the host needs."""


def export(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    path: str | os.PathLike[str],
    config: HawkConfig | None = None,
    *,
    format: str = "onnx",
    overwrite: bool = False,
    processor: Any = None,
    progress: Listener = nobody,
    **settings: Any,
) -> Manifest:
    """Write a model with pruning inside its prefill to a folder, for a runtime without PyTorch.

    Args:
        model: an image-text-to-text model, optimised or not; it is left as it was. Of an omni model, the part that is
            one is written.
        inputs: one prompt with at least one image, as for `generate` (input_ids [B, S], pixel_values, ...). It only
            shows which inputs the model takes: batch, prompt length, number and sizes of images are symbolic.
        path: the folder to write; it must not exist, unless `overwrite`.
        config: the settings, or
        **settings: the settings by name, as for `optimize`; those that an export takes are `TAKEN` in
            `hawk_compile.exporting.settings`. `ratio`, the fraction of visual tokens removed, in [0, 1), is the default
            of requests, each of which may set its own. Beside them, for ONNX `quantization` ("int8"); for TensorRT and
            ExecuTorch `sizes`, see `hawk_compile.exporting.profile`; for TensorRT also `compute_capabilities`.
        format: 'onnx', 'aoti', 'openvino', 'tensorrt' or 'executorch'.
        overwrite: replace the folder if it is an export.
        processor: saved beside the model, if given.
        progress: told of each component that has been written.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`.
        ConfigError: also a setting that an export, or this format, does not take.
        ExportError: an unknown format, a package that is missing, or a component that the format cannot take.
        InputError: inputs without an image, or a folder that is in the way.
    """
    place, target = path_of(path, "path"), target_of(format, to_write=True)
    made, options = settings_of(target, format, config, settings)
    model = pruned_part(model)
    check_model(model, made.modalities)
    check_exporters()
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"inputs must be a mapping of the forward's arguments, got {type(inputs).__name__}: give what the model's "
            "processor returns for a prompt with an image"
        )
    check_modality(model, inputs, made.modalities)
    check_encoder(model)
    check_generate(model)
    check_cache(model)
    check_window(model)
    check_weights(model)
    check_dtype(model, target, format)
    chat = chat_of_export(model, made, processor)
    with capture_lock, written_whole(place, overwrite) as folder:
        weights = resolve(made.used_head_weights, model)
        portable = getattr(target, "PORTABLE", True)
        # Closed where a writer fails: only then are the model's modules in training again.
        with closing(components(model, inputs, made, weights.values, portable, options)) as graphs:
            parts = write_parts(target, graphs, folder, options, progress)
        save_beside(model, processor, folder)
        manifest = manifest_of(model, made, weights, target, format, parts, folder, chat)
        manifest.write(folder)
    return manifest


def check_modality(model: PreTrainedModel, inputs: dict[str, Any], asked: tuple[str, ...]) -> None:
    """Refuse inputs of which something would stay whole, and audio that is encoded within the prefill, whose graph
    then depends on how long it is."""
    present = modalities_of(model, inputs)
    if whole := sorted(present - set(asked)):
        raise ExportError(
            f"the inputs have {' and '.join(whole)}, and modalities={asked} leave that whole: an export prunes all "
            f"that its inputs have, so give others, or modalities={tuple(sorted(present))}"
        )
    if AUDIO in present and encodes_audio_itself(model):
        raise ExportError(
            f"{type(model).__name__} with audio cannot be exported: it encodes audio in the middle of its forward, not "
            "by a method of its own, so the encoder is no component; export from inputs with images alone, or run the "
            "model with hawk_compile.optimize"
        )


def check_encoder(model: PreTrainedModel) -> None:
    """Refuse a model of which no encoder can be written apart from its forward."""
    if merges_itself(model):
        raise ExportError(
            f"{type(model).__name__} cannot be exported: it encodes images in the middle of its forward, and an export "
            "writes the encoder as a component of its own; run the model with hawk_compile.optimize"
        )


def check_generate(model: PreTrainedModel) -> None:
    """Refuse a model whose `generate` does not run its forward: there is no step of it that could be exported."""
    if (part := text_part(model)) is not None:
        raise ExportError(
            f"{type(model).__name__} cannot be exported: its own generate embeds the prompt and goes on with its "
            f"{part[0]} from these embeddings, and its forward has no step without images; run the model with "
            "hawk_compile.optimize"
        )


def components(
    model: PreTrainedModel, inputs: dict[str, Any], config: HawkConfig, head_weights: Tensor, portable: bool,
    options: Any = None,
) -> Generator[Component]:  # fmt: skip
    """Encoders, prefill and decode, in this order, ready to be written.

    Args:
        portable: as for `prune`.
        options: the format's own; their `selection`, if they have one, is for `prune`.

    Raises:
        GraphError: the prefill cannot be pruned.
        ExportError: a component cannot be traced.
    """
    if inputs.get("input_ids") is None:
        raise InputError("inputs must hold input_ids [B, S], since exports take no embeddings: give the ids")
    if not raw_modalities(model, inputs):
        raise InputError("inputs must hold a prompt with an image (pixel_values) or audio, to be traced: give one")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield from encoder_components(model, inputs)
        prefill = prefill_component(model, inputs, config, head_weights)
        prefill = prune(prefill, config, portable, getattr(options, "selection", "sort"))
        yield prefill
        yield decode_component(model, prefill)
    finally:
        for module in training:
            module.training = True


def chat_of_export(model: PreTrainedModel, config: HawkConfig, processor: Any) -> Chat:
    """What the manifest says of chats. A processor that is only saved need not have a chat template.

    Raises:
        ConfigError: nothing can be learned from the processor that the settings name.
    """
    path = checkpoint_of(model)
    ends = special_ids(model, config).end_of_turn
    if processor is None:
        return chat_of_settings(config, path, ends)
    return chat_of(processor, path, ends)


def manifest_of(
    model: PreTrainedModel, config: HawkConfig, weights: HeadWeights, target: Any, format: str, parts: dict[str, Part],
    folder: Path, chat: Chat,
) -> Manifest:  # fmt: skip
    """What a folder holds, of which everything but the manifest is written."""
    written = {file for part in parts.values() for file in part.sha256}
    ids = special_ids(model, config)
    return Manifest(
        format=format,
        ratio=config.ratio,
        selector=config.method.name,
        selector_options=dict(config.method.options),
        query=config.used_query,
        normalization=config.used_normalization,
        modalities=list(config.modalities),
        head_weights=weights.values.tolist(),
        head_weights_origin=weights.origin,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        model=type(model).__name__,
        encoders=[name for name in parts if name not in (PREFILL, DECODE)],
        parts=parts,
        files={file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.name not in written},
        ids={
            "vision_end": list(ids.vision_end), "end_of_turn": list(ids.end_of_turn), "special": list(ids.special),
            "placeholders": placeholder_ids(model),
        },
        chat=None if chat.form is None else chat.form.to_json(),
        chat_template=chat.origin,
        versions={name: importlib.metadata.version(name) for name in (*OWN_PACKAGES, *target.PACKAGES)},
    )  # fmt: skip


def save_beside(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """What the runner needs of the model: its configurations, the parameters of its body itself, the processor."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    held = {name: value.detach().cpu().contiguous() for name, value in model.base_model.named_parameters(recurse=False)}
    if held:
        save_file(held, folder / HOST_WEIGHTS)
    if processor is not None:
        processor.save_pretrained(folder)
