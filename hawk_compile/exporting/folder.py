"""The folder of an export: it is there whole, or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hawk_compile.errors import ExportError, InputError
from hawk_compile.exporting.manifest import FILE_NAME


@contextlib.contextmanager
def written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of `path` at the end, and leaves nothing behind if that is not reached."""
    check_free(path, overwrite)
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


def check_free(path: Path, overwrite: bool, argument: str = "path", switch: str = "overwrite=True") -> None:
    """Raises InputError where something is in the way, in the words of Python or, if given, of the command line."""
    if path.exists() and not (overwrite and (path / FILE_NAME).is_file()):
        remedy = (
            "it holds no earlier export that could be overwritten, so give another folder"
            if overwrite
            else f"give another folder, or {switch} for an earlier export"
        )
        raise InputError(f"{argument} must be a folder that does not exist yet, got {path}: {remedy}")


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


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())
