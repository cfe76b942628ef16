"""`manifest.json`: what an exported folder holds, and how to run it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hawk_compile.errors import ManifestError
from hawk_compile.plan.chat import Chat, ChatFormat
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.selectors import SELECTORS, selector_named

FILE_NAME = "manifest.json"
VERSION = 5


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

    Raises:
        ManifestError: no export, one of another version, or a file that is missing or not the one that was written.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ManifestError(
            f"{folder} is no export: it holds no {FILE_NAME}; give a folder that hawk_compile.export wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("manifest_version")
        if version != VERSION:
            raise ManifestError(
                f"{path} has manifest_version {version}, and this release reads {VERSION}: export again"
            )
        parts = {
            role: Part(**{**part, "inputs": specs(part["inputs"]), "outputs": specs(part["outputs"])})
            for role, part in content.pop("parts").items()
        }
        manifest = Manifest(**content, parts=parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{path} is no manifest of hawk_compile ({type(error).__name__}: {error}): export again"
        ) from None
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
    """Refuse a manifest that lacks a component, or names a file without its hash."""
    engines = [each.get("engines", {}) for each in (part.details for part in manifest.parts.values())]
    opened = {part.file: part.sha256 for part in manifest.parts.values()}
    lacking = [
        *({"prefill", "decode", *manifest.encoders} - manifest.parts.keys()),
        *({"vision_end", "end_of_turn", "special"} - manifest.ids.keys()),
        *({"config.json", "generation_config.json"} - manifest.files.keys()),
        *(name for name, hashes in opened.items() if name not in hashes),
        *(each["file"] for named in engines for each in named.values()
          if not any(each["file"] in hashes for hashes in opened.values())),
    ]  # fmt: skip
    try:
        chat_of_manifest(manifest)
    except (KeyError, TypeError, ValueError):
        lacking.append("chat")
    if lacking or not all(isinstance(weight, float) for weight in manifest.head_weights):
        raise ManifestError(
            f"{path} is no manifest of hawk_compile (it lacks {', '.join(lacking) or 'head weights'}): export again"
        )


def specs(given: list[dict[str, Any]]) -> list[TensorSpec]:
    return [TensorSpec(**each) for each in given]


def check_files(folder: Path, sha256: dict[str, str], owner: str) -> None:
    for name, expected in sha256.items():
        path = folder / name
        if path.parent.resolve() != folder.resolve():
            raise ManifestError(f"the manifest names {name}, which lies outside {folder}: do not load it")
        if not path.is_file():
            raise ManifestError(f"{folder} lacks {name} of {owner}: copy the whole folder, or export again")
        found = file_digest(path)
        if found != expected:
            raise ManifestError(
                f"{name} of {owner} is not the file that was exported (SHA-256 {found[:12]}..., the "
                f"manifest says {expected[:12]}...): copy the folder again, or export again"
            )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chat_of_manifest(manifest: Manifest) -> Chat:
    """What the manifest says of the chat format."""
    form = None if manifest.chat is None else ChatFormat.from_json(manifest.chat)
    return Chat(form, manifest.chat_template)
