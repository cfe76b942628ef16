"""The command `hawk-compile survey`."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from hawk_compile.errors import InputError
from hawk_compile.tools.survey.checks import CHECKS, Check, survey
from hawk_compile.tools.survey.outcome import Survey
from hawk_compile.tools.survey.table import (
    COLUMNS,
    Types,
    broken,
    changes,
    chosen,
    counts,
    here,
    page,
    read_types,
    untried,
)
from hawk_compile.tools.survey.tiny import read


def survey_folder(
    console: Console, folder: Path, types: list[str], out: Path | None, table: Path | None, before: Path | None,
    exports: list[str], exports_only: bool = False, only: Sequence[str] = (),
) -> bool:  # fmt: skip
    """Check the tiny models of a folder, a line for each, and say what differs from an earlier survey.

    Where `out` is there already, what it says of checks that do not run stays, and of types that are not named; it is
    written after each type, so that what has run is kept. What the folder lacks is named where an earlier survey was
    given, or where the folder is the shipped one's, and else counted.

    Args:
        before: the earlier survey; the shipped one, if None.
        exports: formats to export to as well.
        exports_only: nothing else is checked.
        only: names of the checks to run, here or on the page; all, if empty.

    Returns:
        Whether all that was right is right still.

    Raises:
        InputError: a folder without descriptions, a type that is not among them, a check that is none, an earlier
            survey that is none, or one in `out` that other releases made and that is to be kept.
    """
    described = {path.stem: path for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    if not described:
        raise InputError(f"{folder} must be a folder with tiny models, one JSON file each, and holds none: correct it")
    earlier = read_types() if before is None else read_types(before)
    names = chosen(described, types)
    tiny = {name: read(described[name]) for name in names}
    others = [read(path) for name, path in described.items() if name not in tiny]
    own = before is not None or mostly(earlier, described)
    kept = kept_surveys(out, bool(types or exports_only or only))
    if not types:
        kept = {name: each for name, each in kept.items() if name in described}
    checks = checks_of(exports, exports_only, only)
    found = []
    for name in names:
        result = survey(tiny[name], checks)
        console.print(f"{name}: {line_of(result)}", soft_wrap=True)
        found.append(result.with_earlier(kept.get(name)))
        if out is not None:
            now = here(found)
            Types(now.versions, {**kept, **now.surveys}).write(out)
    now = here(found)
    if types or not own:
        earlier = Types(earlier.versions, {name: each for name, each in earlier.surveys.items() if name in names})
    model_types = {each.model_type for each in found}
    console.print(f"{counts(found)[0]} of {len(model_types)} model types are right ({len(found)} tiny models)")
    if missing := untried(each.model_type for each in (*tiny.values(), *others)):
        listed = ", ".join(missing) if own else f"{len(missing)} model types with images that transformers has"
        console.print(f"not in {folder}: {listed}", soft_wrap=True)
    for line in changes(earlier, now):
        console.print(line, soft_wrap=True)
    if table is not None:
        options = {"exports": ",".join(exports), "checks": ",".join(only), "before": before, "out": out, "table": table}
        whole = Types(now.versions, {**kept, **now.surveys})
        table.write_text(page(whole, command_of(folder, types, exports_only, options), own))
    return not broken(earlier, now)


def mostly(earlier: Types, described: Mapping[str, Path]) -> bool:
    """Whether a folder describes most tiny models of an earlier survey, and so is the one that it was made of."""
    return 2 * len(earlier.surveys.keys() & described.keys()) > len(earlier.surveys)


def command_of(folder: Path, types: Sequence[str], exports_only: bool, options: Mapping[str, object]) -> str:
    """What is typed to run a survey."""
    words = ["hawk-compile", "survey", str(folder), *types]
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value else []
    return shlex.join([*words, *(["--exports-only"] if exports_only else [])])


def checks_of(exports: list[str], exports_only: bool, only: Sequence[str]) -> dict[str, Check]:
    if exports_only and not exports:
        raise InputError("exports_only leaves nothing to check without exports: name formats, as --exports onnx")
    if unknown := sorted(set(only) - CHECKS.keys() - {COLUMNS[name] for name in CHECKS}):
        known = ", ".join(COLUMNS[name] for name in CHECKS)
        raise InputError(f"checks must be among {known}, got {', '.join(unknown)}")
    checks = {
        name: check for name, check in CHECKS.items()
        if not exports_only and (not only or name in only or COLUMNS[name] in only)
    }  # fmt: skip
    if exports:
        from hawk_compile.tools.survey.exports import exported_as

        checks |= {form: exported_as(form) for form in exports}
    return checks


def line_of(result: Survey) -> str:
    """What a survey of one type found, and how long it took."""
    states = ["right" if result.right else result.refusal or result.trouble or "nothing asked"] if result.pruned else []
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
