"""`manifest.json` of a folder that `save_compiled` wrote: what must be equal here, and how its graphs are called."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hawk_compile.errors import ManifestError
from hawk_compile.exporting.manifest import FILE_NAME, MOST_BYTES, check_place
from hawk_compile.exporting.schema import Misfit, made_of
from hawk_compile.files import digest_of, read_json, shown
from hawk_compile.saved import sizes
from hawk_compile.saved.calls import builder

KIND = "compiled"
VERSION = 1
REMEDY = "call hawk_compile.save_compiled again, here and now"


@dataclass(frozen=True)
class Part:
    """One graph: its file with its SHA-256, and the rest as `hawk_compile.saved.graph.Graph` has it."""

    file: str
    sha256: dict[str, str]
    inputs: list[int | str]
    call: Any
    shapes: list[list[Any]]
    symbols: dict[str, list[int]]
    ranges: dict[str, list[int | None]]
    conditions: list[Any]
    recipe: Any
    layer: int


@dataclass(frozen=True)
class Manifest:
    """What `load_compiled` reads.

    Attributes:
        key, modules: what must be equal, by name; see `hawk_compile.saved.key`.
        files: none; an export names there what lies beside its parts, and by it both are known for ours.
    """

    key: dict[str, str]
    modules: dict[str, str]
    parts: dict[str, Part]
    kind: str = KIND
    manifest_version: int = VERSION
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of a folder, all of it checked, its files by their hashes.

    Raises:
        ManifestError: no folder of compiled graphs, or one that is not whole.
    """
    if not os.path.lexists(folder / FILE_NAME):
        raise ManifestError(
            f"{shown(folder)} holds no compiled graphs, since there is no {FILE_NAME} in it: give a folder that "
            "hawk_compile.save_compiled wrote"
        )
    check_place(folder, FILE_NAME)
    content = read_json(folder / FILE_NAME, ManifestError, f"{FILE_NAME} must be that of compiled graphs", MOST_BYTES)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != KIND:
        raise ManifestError(
            f"{shown(folder)} holds no compiled graphs, since kind of its {FILE_NAME} is {shown(repr(kind), 40)}: give "
            "a folder that hawk_compile.save_compiled wrote (hawk_compile.load takes those of export)"
        )
    if content.get("manifest_version") != VERSION:
        raise ManifestError(
            f"{shown(folder)} has manifest_version {shown(repr(content.get('manifest_version')), 40)}, and this "
            f"release reads {VERSION}: {REMEDY}"
        )
    try:
        manifest = made_of(Manifest, content)
        for part in manifest.parts.values():
            check_part(part)
    except (Misfit, RuntimeError) as error:
        raise ManifestError(
            f"{FILE_NAME} of {shown(folder)} is not one of compiled graphs ({shown(str(error), 200)}): {REMEDY}"
        ) from None
    if not manifest.parts:
        raise ManifestError(f"{shown(folder)} names no graphs: {REMEDY}")
    for part in manifest.parts.values():
        check_file(folder, part)
    return manifest


def check_part(part: Part) -> None:
    """Refuse a part that cannot be called.

    Raises:
        Misfit: as said.
    """
    count, symbols = len(part.shapes), {*part.symbols}
    if [*part.sha256] != [part.file]:
        raise Misfit(f"{part.file} has no hash")
    if any(isinstance(source, int) and not 0 <= source < count for source in part.inputs):
        raise Misfit("inputs name a tensor that no call has")
    for name, place in part.symbols.items():
        if len(place) != 2 or not 0 <= place[0] < count or not 0 <= place[1] < len(part.shapes[place[0]]):
            raise Misfit(f"symbols.{name} is the size of no tensor")
    if part.ranges.keys() != symbols or any(len(bounds) != 2 for bounds in part.ranges.values()):
        raise Misfit("ranges are not those of the symbols")
    for expression in (*part.conditions, *(size for shape in part.shapes for size in shape)):
        sizes.check(expression, symbols)
    builder(part.recipe)


def check_file(folder: Path, part: Part) -> None:
    check_place(folder, part.file)
    if not os.path.lexists(folder / part.file):
        raise ManifestError(f"{shown(folder)} lacks {part.file}: copy the whole folder, or {REMEDY}")
    digest = digest_of(folder / part.file, ManifestError, "a file of compiled graphs must be there")
    if digest != part.sha256[part.file]:
        raise ManifestError(
            f"{part.file} is not the file that was saved (SHA-256 {digest[:12]}..., the manifest says "
            f"{shown(part.sha256[part.file], 12)}): copy the folder again, or {REMEDY}"
        )
