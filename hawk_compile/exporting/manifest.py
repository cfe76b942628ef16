"""`manifest.json`: what an exported folder holds, and how to run it."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hawk_compile.errors import ManifestError
from hawk_compile.exporting.schema import Misfit, made_of
from hawk_compile.files import digest_of, read_json, shown
from hawk_compile.plan.chat import Chat, ChatFormat
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.selectors import SELECTORS, selector_named

FILE_NAME = "manifest.json"
VERSION = 5
MOST_BYTES = 16 << 20
"""Of a manifest; a tokenizer with thousands of special ids makes some hundred kilobytes."""
PLAIN_NAME = re.compile(r"\w[\w .+=@-]{0,254}")
"""A file's name without a folder, a drive or a control character."""
DEVICES = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "meta")
"""Types of torch's devices that models are exported from."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its dtype as torch names it, and its shape; symbolic sizes are names."""

    name: str
    dtype: str
    shape: list[str | int]


@dataclass(frozen=True)
class Part:
    """One exported component: the file that is opened first, all its files with their SHA-256, and its tensors.

    `least` holds the smallest values of symbolic sizes, where they are known.
    `details` is what its format has to say beyond that, such as engines and sizes of TensorRT.
    """

    name: str
    file: str
    sha256: dict[str, str]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    least: dict[str, int]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What `hawk_compile.load` reads.

    Attributes:
        format: 'onnx', 'aoti', 'openvino', 'tensorrt' or 'executorch'.
        ratio: fraction of visual tokens removed unless a request says otherwise.
        selector, selector_options, query, normalization, head_weights, head_weights_origin: how visual tokens
            are scored and chosen; modalities: of what.
        dtype: of weights and activations.
        model: class of the exported model.
        encoders: names of the components that encode images, in the order they run.
        parts: every component by its role: the encoders, 'prefill', 'decode'.
        files: SHA-256 of every other file: configurations, the processor, weights that the host needs.
        ids: special ids that bound the question: vision_end, end_of_turn, special; and the placeholders.
        chat: what the chat template puts around a user's text, as `hawk_compile.plan.chat.ChatFormat`; None: none is
            known. A prefill takes `question_mask` [B, S], 1 for the tokens that vote; `hawk_compile.load` makes it of
            these ids, and who runs the files without it gives 1 for each token of the newest user's text.
        chat_template: which template that was, or why there is none.
        versions: of the software that exported.
    """

    format: str
    ratio: float
    selector: str
    selector_options: dict[str, Any]
    query: str
    normalization: str
    modalities: list[str]
    head_weights: list[float]
    head_weights_origin: str
    dtype: str
    device: str
    model: str
    encoders: list[str]
    parts: dict[str, Part]
    files: dict[str, str]
    ids: dict[str, list[int]]
    chat: dict[str, Any] | None
    chat_template: str
    versions: dict[str, str]
    manifest_version: int = VERSION

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of a folder, its files checked against their hashes.

    The hashes find damage, not malice: who writes a folder writes them too.

    Raises:
        ManifestError: no export, one of another version, or a file that is missing or not the one that was written.
    """
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        raise ManifestError(
            f"{folder} is no export: it holds no {FILE_NAME}; give a folder that hawk_compile.export wrote"
        )
    check_place(folder, FILE_NAME)
    content = read_json(path, ManifestError, f"{FILE_NAME} must be that of an export", MOST_BYTES)
    version = content.get("manifest_version") if isinstance(content, dict) else None
    if isinstance(content, dict) and version != VERSION:
        raise ManifestError(
            f"{path} has manifest_version {shown(repr(version), 40)}, and this release reads {VERSION}: export again"
        )
    try:
        manifest = made_of(Manifest, content)
    except Misfit as error:
        raise ManifestError(f"{path} is no manifest of hawk_compile ({error}): export again") from None
    check_whole(path, manifest)
    checked: dict[str, str] = {}
    for name, part in manifest.parts.items():  # which may share files
        fresh = {file: sha256 for file, sha256 in part.sha256.items() if checked.get(file) != sha256}
        check_files(folder, fresh, f"component {name}")
        checked |= fresh
    check_files(folder, manifest.files, "the configuration")
    return manifest


def config_of(manifest: Manifest) -> HawkConfig:
    """The settings that a folder was exported with, whole.

    A ranking function of one's own lies in the prefill's graph, and a manifest has only its name: "hawk" stands in its
    place here, with all that was exported beside it.
    """
    known = manifest.selector in SELECTORS
    selector = selector_named(manifest.selector, manifest.selector_options) if known else SELECTORS["hawk"]
    return HawkConfig(
        ratio=manifest.ratio,
        selector=selector,
        query=manifest.query,
        normalization=manifest.normalization,
        modalities=tuple(manifest.modalities),
        head_weights="auto" if selector.head_weights else tuple(manifest.head_weights),
        end_of_turn_token_id=tuple(manifest.ids["end_of_turn"]),
    )


def check_whole(path: Path, manifest: Manifest) -> None:
    """Refuse a manifest that lacks a component, names a file without its hash, or says what no export says."""
    opened = {part.file: part.sha256 for part in manifest.parts.values()}
    hashed = {name for hashes in opened.values() for name in hashes}
    lacking = [
        *({"prefill", "decode", *manifest.encoders} - manifest.parts.keys()),
        *({"vision_end", "end_of_turn", "special"} - manifest.ids.keys()),
        *({"config.json", "generation_config.json"} - manifest.files.keys()),
        *(name for name, hashes in opened.items() if name not in hashes),
        *(file for part in manifest.parts.values() for file in named_in(part.details) if file not in hashed),
    ]
    wrong = [
        *(f"dtype {name}" for name in dtypes_of(manifest) if not isinstance(getattr(torch, name, None), torch.dtype)),
        *([f"device {manifest.device}"] if manifest.device not in DEVICES else []),
    ]
    try:
        chat_of_manifest(manifest)
    except (KeyError, TypeError, ValueError):
        lacking.append("chat")
    if lacking or wrong:
        what = "; ".join(f"it {verb} {shown(', '.join(names), 200)}"
                         for verb, names in (("lacks", lacking), ("names", wrong)) if names)  # fmt: skip
        raise ManifestError(f"{path} is no manifest of hawk_compile ({what}): export again")


def dtypes_of(manifest: Manifest) -> list[str]:
    tensors = (each for part in manifest.parts.values() for each in (*part.inputs, *part.outputs))
    return sorted({manifest.dtype, *(each.dtype for each in tensors)})


def named_in(details: dict[str, Any]) -> list[str]:
    """The files that a format's own details name: engines of TensorRT, weights of AOTInductor.

    What is no such table names the file "", which no folder has.
    """
    engines, weights = details.get("engines", {}), details.get("weights", {})
    if not isinstance(engines, dict) or not isinstance(weights, dict):
        return [""]
    files = [each.get("file", "") if isinstance(each, dict) else "" for each in engines.values()]
    tables = [isinstance(taken, dict) and all(isinstance(key, str) for key in taken.values())
              for taken in weights.values()]  # fmt: skip
    return [file if isinstance(file, str) else "" for file in files] + [*weights, *([] if all(tables) else [""])]


def check_files(folder: Path, sha256: dict[str, str], owner: str) -> None:
    for name, expected in sha256.items():
        check_place(folder, name)
        path = folder / name
        if not os.path.lexists(path):
            raise ManifestError(f"{folder} lacks {name} of {owner}: copy the whole folder, or export again")
        found = file_digest(path)
        if found != expected:
            raise ManifestError(
                f"{name} of {owner} is not the file that was exported (SHA-256 {found[:12]}..., the "
                f"manifest says {shown(expected, 12)}): copy the folder again, or export again"
            )


def check_place(folder: Path, name: str) -> None:
    """Refuse a file that would be read from elsewhere: by its name, on any system, or by a symbolic link.

    The cache of the Hub is let through, whose snapshots are folders of links to its blobs.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise ManifestError(
            f"the manifest names {shown(repr(name), 80)}, which lies outside {folder} or is no file's name: do not "
            "load it"
        )
    if not os.path.islink(folder / name):
        return
    whole = Path(os.path.realpath(folder))
    homes = (whole, whole.parents[1] / "blobs") if whole.parent.name == "snapshots" else (whole,)
    if Path(os.path.realpath(folder / name)).parent not in homes:
        raise ManifestError(f"{name} is a symbolic link, whose file lies outside {folder}: do not load it")


def file_digest(path: Path) -> str:
    return digest_of(path, ManifestError, "a file of an export must be there")


def chat_of_manifest(manifest: Manifest) -> Chat:
    """What the manifest says of the chat format."""
    form = None if manifest.chat is None else ChatFormat.from_json(manifest.chat)
    return Chat(form, manifest.chat_template)
