"""The folder of an export: it is there whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hawk_compile.errors import ExportError, InputError, ManifestError
from hawk_compile.exporting.manifest import FILE_NAME
from hawk_compile.files import read_json, real_path, shown


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end, and leaves nothing behind if that is not reached."""
    try:
        path = real_path(path)  # of a link, what it leads to is replaced
        check_free(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ExportError(
            f"{shown(path)} cannot be made ({error.strerror}): give a folder in a place that can be written to"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        check_free(path, overwrite)  # an export takes minutes
        put_in_place(folder, path)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written ({error}), and nothing of this export is left: mend that, and export again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(path: Path, overwrite: bool, argument: str = "path", switch: str = "overwrite=True") -> None:
    """Raises InputError where something is in the way, in the words of Python or, if given, of the command line.

    An earlier export is a folder that holds what its manifest names and nothing else: all of it is deleted.
    """
    if not os.path.lexists(path):
        return
    rule = f"{argument} must be a folder that does not exist yet, got {path}"
    if not overwrite:
        raise InputError(f"{rule}: give another folder, or {switch} for an earlier export")
    named = named_by_manifest(path)
    if named is None:
        raise InputError(f"{rule}: it holds no earlier export that could be overwritten, so give another folder")
    if others := sorted(each.name for each in path.iterdir() if each.name not in named or each.is_dir()):
        raise InputError(
            f"{rule}: beside an earlier export it holds {shown(', '.join(others), 200)}, which would be deleted with "
            "it: move that elsewhere, or give another folder"
        )


def named_by_manifest(path: Path) -> set[str] | None:
    """The files of an export of any version, by what its manifest says; None where there is none."""
    try:
        content = read_json(path / FILE_NAME, ManifestError, "")
        parts = [file for part in content["parts"].values() for file in part["sha256"]]
        return {FILE_NAME, *content["files"], *parts} if "manifest_version" in content else None
    except (ManifestError, KeyError, TypeError, AttributeError):
        return None


def put_in_place(folder: Path, path: Path) -> None:
    """Rename the folder to `path`; an earlier export there goes when that has been done, and not before."""
    if not path.exists():
        folder.rename(path)
        return
    earlier = folder.with_name(f"{folder.name}-earlier")
    path.rename(earlier)
    try:
        folder.rename(path)
    except BaseException:
        if not path.exists():
            earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())
