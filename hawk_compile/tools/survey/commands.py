"""The command `hawk-compile survey`."""

from pathlib import Path

from rich.console import Console

from hawk_compile.errors import InputError
from hawk_compile.tools.survey.checks import CHECKS, survey
from hawk_compile.tools.survey.table import Types, changes, chosen, here, page, read_types
from hawk_compile.tools.survey.tiny import read


def survey_folder(
    console: Console, folder: Path, types: list[str], out: Path | None, table: Path | None, before: Path | None,
    exports: list[str],
) -> None:  # fmt: skip
    """Check the tiny models of a folder, a line for each, and say what differs from an earlier survey.

    Of named types, the rows of `out` are replaced where that file is there already, and the others stay.

    Raises:
        InputError: a folder without descriptions, a type that is not among them, an earlier survey that is none, or
            one in `out` that other releases made.
    """
    described = {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    if not described:
        raise InputError(f"{folder} must be a folder with tiny models, one JSON file each, and holds none: correct it")
    earlier = read_types() if before is None else read_types(before)
    kept = read_types(out) if types and out is not None and out.exists() else None
    if kept is not None:
        refuse_other_releases(kept, out)
    checks = dict(CHECKS)
    if exports:
        from hawk_compile.tools.survey.exports import exported_as

        checks |= {form: exported_as(form) for form in exports}
    found = []
    for name in chosen(described, types):
        result = survey(read(described[name]), checks)
        found.append(result)
        state = "right" if result.right else result.refusal or result.trouble
        console.print(f"{name}: {state} ({result.seconds:.1f} s)", soft_wrap=True)
    now = here(found)
    if types:
        earlier = Types(earlier.versions, {name: each for name, each in earlier.surveys.items() if name in types})
    console.print(f"{sum(each.right for each in found)} of {len(found)} are right")
    for line in changes(earlier, now):
        console.print(line, soft_wrap=True)
    if kept is not None:
        now = Types(now.versions, {**kept.surveys, **now.surveys})
    if out is not None:
        now.write(out)
    if table is not None:
        written = "" if out is None else f"--out {out} "
        table.write_text(page(now, f"hawk-compile survey {folder} {written}--table {table}"))


def refuse_other_releases(kept: Types, path: Path | None) -> None:
    """Refuse to put rows beside those that other releases made.

    Raises:
        InputError: names both.
    """
    if (installed := here([]).versions) != kept.versions:
        raise InputError(
            f"{path} holds a survey by {kept.versions}, and {installed} are here: survey all types, or write named "
            "ones to a file of their own"
        )
