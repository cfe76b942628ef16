"""The command `hawk-compile survey`."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hawk_compile.errors import InputError
from hawk_compile.tools.survey.checks import CHECKS, Check, survey
from hawk_compile.tools.survey.outcome import Survey
from hawk_compile.tools.survey.table import Types, changes, chosen, counts, here, page, read_types, untried
from hawk_compile.tools.survey.tiny import read


def survey_folder(
    console: Console, folder: Path, types: list[str], out: Path | None, table: Path | None, before: Path | None,
    exports: list[str], exports_only: bool = False, only: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check the tiny models of a folder, a line for each, and say what differs from an earlier survey.

    Where `out` is there already, what it says of checks that do not run stays, and of types that are not named; it is
    written after each type, so that what has run is kept.

    Args:
        exports: formats to export to as well.
        exports_only: nothing else is checked.
        only: names of the checks to run; all, if empty.

    Raises:
        InputError: a folder without descriptions, a type that is not among them, a check that is none, an earlier
            survey that is none, or one in `out` that other releases made and that is to be kept.
    """
    described = {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    if not described:
        raise InputError(f"{folder} must be a folder with tiny models, one JSON file each, and holds none: correct it")
    earlier = read_types() if before is None else read_types(before)
    names = chosen(described, types)
    kept = kept_surveys(out, bool(types or exports_only or only))
    if not types:
        kept = {name: each for name, each in kept.items() if name in described}
    checks = checks_of(exports, exports_only, only)
    found = []
    for name in names:
        result = survey(read(described[name]), checks)
        console.print(f"{name}: {line_of(result)}", soft_wrap=True)
        found.append(result.with_earlier(kept.get(name)))
        if out is not None:
            now = here(found)
            Types(now.versions, {**kept, **now.surveys}).write(out)
    now = here(found)
    if types:
        earlier = Types(earlier.versions, {name: each for name, each in earlier.surveys.items() if name in types})
    model_types = {each.model_type for each in found}
    console.print(f"{counts(found)[0]} of {len(model_types)} model types are right ({len(found)} tiny models)")
    if missing := untried(read(path).model_type for path in described.values()):
        console.print(f"not in {folder}: {', '.join(missing)}", soft_wrap=True)
    for line in changes(earlier, now):
        console.print(line, soft_wrap=True)
    if table is not None:
        written = "" if out is None else f"--out {out} "
        whole = Types(now.versions, {**kept, **now.surveys})
        table.write_text(page(whole, f"hawk-compile survey {folder} {written}--table {table}"))


def checks_of(exports: list[str], exports_only: bool, only: Sequence[str]) -> dict[str, Check]:
    if exports_only and not exports:
        raise InputError("exports_only leaves nothing to check without exports: name formats, as --exports onnx")
    if unknown := sorted(set(only) - CHECKS.keys()):
        raise InputError(f"checks must be among {', '.join(CHECKS)}, got {', '.join(unknown)}")
    checks = {} if exports_only else {name: check for name, check in CHECKS.items() if not only or name in only}
    if exports:
        from hawk_compile.tools.survey.exports import exported_as

        checks |= {form: exported_as(form) for form in exports}
    return checks


def line_of(result: Survey) -> str:
    """What a survey of one type found, and how long it took."""
    states = [] if not result.pruned else ["right" if result.right else result.refusal or result.trouble or ""]
    for form in result.outcomes.keys() - result.pruned.keys():
        outcome = result.outcomes[form]
        states.append(f"{form} {outcome.status}: {outcome.detail}")
    return f"{'; '.join(states)} ({sum(each.seconds for each in result.outcomes.values()):.1f} s)"


def kept_surveys(path: Path | None, needed: bool) -> dict[str, Survey]:
    """What stands in the file that is to be written; of other releases only what is `needed`, which is refused."""
    if path is None or not path.exists():
        return {}
    kept = read_types(path)
    if needed:
        refuse_other_releases(kept, path)
    return kept.surveys if here([]).versions == kept.versions else {}


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
