"""`export`: a model's components, pruned, written in one format with a manifest; all of it or nothing."""

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.dynamo import capture_lock
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.modalities import AUDIO, modalities_of, placeholder_ids, raw_modalities, takes
from hawk_compile.errors import ConfigError, ExportError, HawkError, InputError
from hawk_compile.exporting.components import (
    DECODE,
    FEATURES_INPUT,
    KEY,
    PAST_KEY,
    PAST_VALUE,
    PREFILL,
    VALUE,
    Component,
    Decode,
    Prefill,
    Shape,
    named_features,
    prune,
)
from hawk_compile.exporting.encoder import encoder_components
from hawk_compile.exporting.manifest import Manifest, Part, TensorSpec, digest
from hawk_compile.exporting.quiet import quiet
from hawk_compile.plan.plan import make_plan
from hawk_compile.plan.question import special_ids
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.overrides import original
from hawk_compile.settings.config import HawkConfig, make_config
from hawk_compile.settings.head_weights import resolve

FORMATS = ("onnx", "aoti", "openvino", "tensorrt", "executorch")
SETTINGS = (
    "head_weights", "normalization", "selector", "selector_options", "query",
    "vision_end_token_id", "end_of_turn_token_id",
)  # fmt: skip
"""Settings of `optimize` that every format takes, beside `ratio`."""
OWN_PACKAGES = ("hawk-compile", "torch", "transformers")
HOST_WEIGHTS = "host.safetensors"
"""Parameters of the model's body itself (as a newline between rows of tiles), which packing on the host needs."""

Progress = Callable[[str], None]


def export(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    ratio: float = 0.8,
    overwrite: bool = False,
    processor: Any = None,
    progress: Progress = lambda line: None,
    **settings: Any,
) -> Manifest:
    """Write a model with pruning inside its prefill to a folder, for a runtime without PyTorch.

    Args:
        model: an image-text-to-text model, optimised or not; it is left as it was.
        inputs: one prompt with at least one image, as for `generate` (input_ids [B, S], pixel_values, ...). It only
            shows which inputs the model takes: batch, prompt length, number and sizes of images are symbolic.
        path: the folder to write; it must not exist, unless `overwrite`.
        format: 'onnx', 'aoti', 'openvino', 'tensorrt' or 'executorch'.
        ratio: fraction of visual tokens removed, in [0, 1): the default of requests, each of which may set its own.
        overwrite: replace the folder if it is an export.
        processor: saved beside the model, if given.
        progress: told in a line what has been done.
        **settings: `head_weights`, `normalization`, `selector`, `selector_options`, `query`,
            `vision_end_token_id`, `end_of_turn_token_id`, as for `optimize`;
            for ONNX also `quantization` ("int8"); for TensorRT and ExecuTorch also `sizes`, see
            `hawk_compile.exporting.profile`; for TensorRT also `compute_capabilities`.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`.
        ExportError: an unknown format, a package that is missing, or a component that the format cannot take.
        InputError: inputs without an image, or a folder that is in the way.
    """
    target = target_of(format, to_write=True)
    options = target.options(settings) if hasattr(target, "options") else None
    if unknown := sorted(settings.keys() - SETTINGS):
        raise ConfigError(
            f"unknown setting {', '.join(unknown)} of format={format!r}; for all formats they are {', '.join(SETTINGS)}"
        )
    config = make_config(None, {"ratio": ratio, **settings})
    if not config.method.portable:
        raise ConfigError(
            f'selector "{config.selector}" cannot be exported: it takes tokens one after another, or has operators '
            "that only PyTorch has (portable=False); optimize runs it; export another one"
        )
    check_modality(model, inputs)
    check_model(model)
    check_dtype(model, target, format)
    with capture_lock, written_whole(Path(path), overwrite) as folder:
        parts: dict[str, Part] = {}
        encoders: list[str] = []
        weights = resolve(config.used_head_weights, model)
        selection = getattr(options, "selection", "sort")
        for component in components(model, inputs, config, weights.values, format != "aoti", selection):
            before = size_of(folder)
            part = parts[component.name] = write_part(target, component, folder, options)
            if component.name not in (PREFILL, DECODE):
                encoders.append(component.name)
            progress(f"{component.name}: {(size_of(folder) - before) / 1e6:.1f} MB in {part.seconds} s")
        parts = with_digests(parts, folder)
        written = {file for part in parts.values() for file in part.sha256}
        ids = special_ids(model, config)
        save_beside(model, processor, folder)
        manifest = Manifest(
            format=format,
            ratio=config.ratio,
            selector=config.method.name,
            selector_options=dict(config.method.options),
            query=config.used_query,
            normalization=config.used_normalization,
            head_weights=weights.values.tolist(),
            head_weights_origin=weights.origin,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            model=type(model).__name__,
            encoders=encoders,
            parts=parts,
            files={file.name: digest(file) for file in sorted(folder.iterdir()) if file.name not in written},
            ids={
                "vision_end": list(ids.vision_end), "end_of_turn": list(ids.end_of_turn), "special": list(ids.special),
                "placeholders": placeholder_ids(model),
            },
            versions={name: importlib.metadata.version(name) for name in (*OWN_PACKAGES, *target.PACKAGES)},
        )  # fmt: skip
        manifest.write(folder)
    return manifest


def check_modality(model: Any, inputs: dict[str, Any]) -> None:
    """Refuse audio, before the model is refused for taking nothing else."""
    hears = isinstance(model, PreTrainedModel) and takes(model, AUDIO)
    sees = hears and (takes(model, "image") or takes(model, "video"))
    if AUDIO in modalities_of(inputs) or (hears and not sees):
        raise ExportError(
            f"{type(model).__name__} with audio cannot be exported: no format writes an audio encoder yet; export from "
            "inputs with images alone, or run the model with hawk_compile.optimize"
        )


def check_dtype(model: PreTrainedModel, target: Any, format: str) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    if hasattr(target, "DTYPES") and dtype not in target.DTYPES:
        raise ExportError(
            f'format="{format}" runs models in {" or ".join(target.DTYPES)}, got one in {dtype}: give model.float(), '
            'or load it with dtype="float32" (on the command line --dtype fp32)'
        )


def target_of(format: str, to_write: bool) -> Any:
    """The module of a format, whose packages are installed: `PACKAGES` to write a folder, `RUN_BY` to run one."""
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    target = importlib.import_module(f"hawk_compile.exporting.{format}")
    for package in target.PACKAGES if to_write else target.RUN_BY:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise ExportError(
                f'format="{format}" needs the package {package}, which is not installed: pip install '
                f'"hawk-compile[{target.EXTRA}]"'
            ) from None
    return target


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end, and leaves nothing behind if that is not reached."""
    from hawk_compile.exporting.manifest import FILE_NAME

    if path.exists() and not (overwrite and (path / FILE_NAME).is_file()):
        remedy = (
            "it holds no earlier export that could be overwritten, so give another folder"
            if overwrite
            else "give another folder, or overwrite=True for an earlier export"
        )
        raise InputError(f"path must be a folder that does not exist yet, got {path}: {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ExportError(
            f"{path} cannot be made ({error}): give a folder in a place that can be written to"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        put_in_place(folder, path)
    except OSError as error:
        raise ExportError(f"{path} could not be written ({error}): nothing of this export is left") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename the folder to `path`; an earlier export there goes when that has been done, and not before."""
    if not path.exists():
        folder.rename(path)
        return
    earlier = folder.with_name(f"{folder.name}-earlier")
    path.rename(earlier)
    try:
        folder.rename(path)
    except OSError:
        earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def components(
    model: PreTrainedModel, inputs: dict[str, Any], config: HawkConfig, head_weights: Tensor, portable: bool,
    selection: str = "sort",
) -> Iterator[Component]:  # fmt: skip
    """Encoders, prefill and decode, in this order, ready to be written; `portable` and `selection` as for `prune`.

    Raises:
        GraphError: the prefill cannot be pruned.
        ExportError: a component cannot be traced.
    """
    if inputs.get("input_ids") is None:
        raise InputError("inputs must hold input_ids [B, S]: exported models take no embeddings")
    if not raw_modalities(inputs):
        raise InputError("inputs must hold a prompt with an image (pixel_values), so that its merge can be traced")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield from encoder_components(model, inputs)
        prefill = prefill_component(model, inputs, config, head_weights)
        prefill = prune(prefill, config, portable, selection)
        yield prefill
        yield decode_component(model, prefill)
    finally:
        for module in training:
            module.training = True


def prefill_component(
    model: PreTrainedModel, inputs: dict[str, Any], config: HawkConfig, head_weights: Tensor
) -> Component:
    """The prefill with every row of the inputs twice for a sample."""
    base: Any = model.base_model
    remembered = getattr(base, "rope_deltas", None)
    with torch.no_grad():
        encoded = run_encoders(model, dict(inputs))
    if hasattr(base, "rope_deltas"):
        base.rope_deltas = remembered  # the model is left as it was
    outputs = {name: output for name, output in encoded["mm_encoder_outputs"].items() if output is not None}
    ids, rows = inputs["input_ids"], len(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = encoded.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(rows, 1)
    sample = {"input_ids": twice(ids, 0), "attention_mask": twice(mask, 0), "position_ids": twice(positions, -2)}
    shapes: dict[str, Shape] = dict.fromkeys(("input_ids", "attention_mask"), ("batch", "prompt"))
    shapes["position_ids"] = ("batch", "prompt") if positions.ndim == 2 else (len(positions), "batch", "prompt")
    if inputs.get("token_type_ids") is not None:
        sample["token_type_ids"], shapes["token_type_ids"] = twice(inputs["token_type_ids"], 0), ("batch", "prompt")
    layered = False
    for modality, output in outputs.items():
        named = named_features(modality, output)
        layered = layered or len(named) > 1
        for name, features in named.items():
            sample[name] = twice(rows_of(features), 0)
            shapes[name] = ("visual", sample[name].shape[1])
    visual = torch.isin(sample["input_ids"], torch.tensor(placeholder_ids(model), device=ids.device))
    count = sum(sample[FEATURES_INPUT.format(modality)].shape[0] for modality in outputs)
    special = special_ids(model, config)
    plan = make_plan(sample["input_ids"], visual, sample["attention_mask"], count, special, config)
    sample["budget"], shapes["budget"] = plan.budget, ("batch",)
    sample["kept_slots"], shapes["kept_slots"] = torch.arange(plan.length, device=ids.device), ("kept",)
    if layered:
        sample["kept_visual_slots"] = torch.arange(sum(plan.kept), device=ids.device)
        shapes["kept_visual_slots"] = ("kept_visual",)
    weights = head_weights.to(ids.device)
    module = Prefill(model, original(model, "forward"), special, config.used_query, weights, outputs)
    # Features of later layers are added to at least two tokens: one row would broadcast.
    return Component(PREFILL, module.eval(), sample, shapes, least={"visual": 2} if layered else {})


def decode_component(model: PreTrainedModel, prefill: Component) -> Component:
    """The decode step; its sample stands behind a cache of three slots, shaped as the prefill's."""
    rows, new, past = len(prefill.sample["input_ids"]), 2, 3
    positions = prefill.shapes["position_ids"]
    device = prefill.sample["input_ids"].device
    ids = prefill.sample["input_ids"][:, -new:].contiguous()
    sample = {"input_ids": ids, "attention_mask": torch.ones((rows, past + new), dtype=torch.int64, device=device)}
    counted = torch.arange(past, past + new, device=device)
    sample["position_ids"] = counted.expand(
        *(size for size in positions[:-2] if isinstance(size, int)), rows, new
    ).contiguous()
    shapes: dict[str, Shape] = {
        "input_ids": ("batch", "new"),
        "attention_mask": ("batch", "total"),
        "position_ids": (*positions[:-2], "batch", "new"),
    }  # fmt: skip
    for layer in range(model.config.get_text_config().num_hidden_layers):
        for name, held in ((PAST_KEY, KEY), (PAST_VALUE, VALUE)):
            made = prefill.results[held.format(layer)]
            _, heads, _, width = made.shape
            sample[name.format(layer)] = made.new_zeros((rows, heads, past, width))
            shapes[name.format(layer)] = ("batch", heads, "past", width)
    return Component(DECODE, Decode(model, original(model, "forward")).eval(), sample, shapes)


def twice(values: Tensor, dim: int) -> Tensor:
    """All rows (or their features) a second time, so that the batch is at least two."""
    return torch.cat([values, values], dim)


def rows_of(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """[V, D] of one modality's features."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def with_digests(parts: dict[str, Part], folder: Path) -> dict[str, Part]:
    """The parts with the SHA-256 of their files, which they may share; each is read once."""
    found = {file: digest(folder / file) for file in {file for part in parts.values() for file in part.sha256}}
    return {name: replace(part, sha256={file: found[file] for file in part.sha256}) for name, part in parts.items()}


def write_part(target: Any, component: Component, folder: Path, options: Any) -> Part:
    """Write a component. The hashes of its files are left empty: later components may add to them."""
    started = time.perf_counter()
    try:
        with quiet():
            files, details = target.write(component, folder, options)
    except (HawkError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"{component.name} cannot be exported to {target.__name__.rsplit('.', 1)[-1]}: {error}"
        ) from error
    return Part(
        name=component.name,
        file=files[0],
        sha256=dict.fromkeys(files, ""),
        inputs=[spec(name, component.sample[name], shape) for name, shape in component.shapes.items()],
        outputs=[spec(name, value, output_shape(component, name, value)) for name, value in component.results.items()],
        least=component.least_sizes,
        seconds=round(time.perf_counter() - started, 1),
        details=details,
    )


def spec(name: str, value: Tensor, shape: Shape) -> TensorSpec:
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), list(shape))


def output_shape(component: Component, name: str, value: Tensor) -> Shape:
    if component.name == PREFILL:
        along = {"scores": "prompt"}.get(name, "kept")
        return tuple(
            {0: "batch"}.get(dim, along if dim == (2 if value.ndim == 4 else 1) and name != "logits" else size)
            for dim, size in enumerate(value.shape)
        )
    if component.name == DECODE:
        return tuple("batch" if dim == 0 else "total" if dim == 2 else size for dim, size in enumerate(value.shape))
    first = next(iter(component.shapes.values()))[0]
    rows = component.sample[next(iter(component.sample))].shape[0]
    return tuple(
        "merged_patches" if dim == 0 and size != rows else first if dim == 0 else size
        for dim, size in enumerate(value.shape)
    )


def save_beside(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """What the runner needs of the model: its configurations, the parameters of its body itself, the processor."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    held = {name: value.detach().cpu().contiguous() for name, value in model.base_model.named_parameters(recurse=False)}
    if held:
        save_file(held, folder / HOST_WEIGHTS)
    if processor is not None:
        processor.save_pretrained(folder)
