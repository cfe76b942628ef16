"""What to do about a checkpoint folder that is not there, or that needs what is not."""

from pathlib import Path

from hawk_compile.settings.head_weights import is_hub_id


def remedy(folder: Path) -> str:
    """How to get the folder of a checkpoint, for the end of an error; a name may be that of a Hub repository."""
    if not is_hub_id(str(folder)):
        return "give the folder of a checkpoint on this machine"
    name = folder.as_posix().partition("@")[0]
    return f"nothing is downloaded here, so first run `hf download {name} --local-dir DIR`, then give DIR"


def reason_of(error: Exception) -> str:
    """Why a checkpoint cannot be loaded, in one line: of a package that is missing all, since its remedy ends it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:400] if isinstance(error, ImportError) else "".join(lines[:1])[:200]
