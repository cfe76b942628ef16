"""What a survey found, kept: as JSON, as a page, and beside an earlier one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from hawk_compile.compat.models import image_text_types
from hawk_compile.errors import InputError
from hawk_compile.exporting.formats import FORMATS
from hawk_compile.files import read_json, shown, write_whole
from hawk_compile.runtime.checks import OTHER_MODEL
from hawk_compile.settings.closest import meant
from hawk_compile.tools.survey.outcome import OPEN, Outcome, Survey

MOST_BYTES = 64 << 20
SHIPPED = resources.files("hawk_compile.tools.survey").joinpath("types.json")
"""The survey of the release that this package was tested with."""
MARKS = {
    "right": "yes", "refused": "refused", "wrong": "**wrong**", "failed": "**fails**", "unasked": "—",
    "untried": "not tried",
}  # fmt: skip
COLUMNS = {
    "ratio 0": "nothing removed", "selection": "selection", "prefill": "prefill", "decode": "decode",
    "turns": "several turns", "batch": "padded batches", "video": "video", "restore": "restore", "onnx": "ONNX",
    "openvino": "OpenVINO",
}  # fmt: skip


@dataclass(frozen=True)
class Types:
    """A survey of many types.

    Attributes:
        versions: of torch and transformers.
        surveys: by the type's name.
    """

    versions: dict[str, str]
    surveys: dict[str, Survey]

    def write(self, path: Path) -> None:
        """As JSON, one type a line."""
        lines = [f"  {json.dumps(name)}: {json.dumps(asdict(each))}" for name, each in sorted(self.surveys.items())]
        body = ",\n".join(lines)
        write_whole(path, f'{{"versions": {json.dumps(self.versions)}, "types": {{\n{body}\n}}}}\n')


def here(surveys: Iterable[Survey]) -> Types:
    """Surveys that were made by the releases that are installed."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Types(versions, {each.name: each for each in surveys})


def read_types(path: Any = SHIPPED) -> Types:
    """Read what `Types.write` wrote.

    Raises:
        InputError: the file holds something else.
    """
    rule = "a file must hold a survey, as `hawk-compile survey --out` writes it"
    held = read_json(path, InputError, rule, MOST_BYTES)
    try:
        surveys = {
            name: Survey(
                name, each["model_type"], {check: Outcome(**outcome) for check, outcome in each["outcomes"].items()},
                each["model_class"], each["layer"], tuple(each.get("notes", ())),
            )
            for name, each in held["types"].items()
        }  # fmt: skip
        return Types(held["versions"], surveys)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{rule}; {shown(path)} cannot be read as one ({type(error).__name__}: {shown(str(error))}): give another "
            "file"
        ) from None


def facts_of(survey: Survey) -> dict[str, str]:
    """What is known of one type, a line for each."""
    facts = {"type": survey.model_type, "tiny model": survey.name, "class": survey.model_class}
    if survey.notes:
        facts["notes"] = "; ".join(survey.notes)
    if survey.right:
        facts["scores with"] = f"decoder layer {survey.layer}" + ("" if survey.layer else ", the first")
    if survey.refusal is not None:
        return facts | {"refused": survey.refusal}
    for name, outcome in survey.outcomes.items():
        detail = f": {outcome.detail}" if outcome.status != "right" else ""
        facts[COLUMNS.get(name, name)] = MARKS[outcome.status].strip("*") + detail
    return facts


def of_type(types: Types, name: str) -> list[Survey]:
    """The surveys of a model type, or the one of that very name."""
    return [types.surveys[each] for each in sorted(types.surveys)
            if name in (each, types.surveys[each].model_type)]  # fmt: skip


def tried(types: Types, name: str) -> list[Survey]:
    """The surveys of a model type that was tried.

    Raises:
        InputError: it was not; says which was meant.
    """
    if known := of_type(types, name):
        return known
    names = types.surveys.keys() | {each.model_type for each in types.surveys.values()}
    raise InputError(
        f"{name} is neither a file or folder nor a model type that was tried{meant(name, names) or '.'} docs/models.md "
        "lists those; or give the config.json of another type"
    )


def untried(model_types: Iterable[str]) -> list[str]:
    """The model types that the installed transformers knows to make text of images and text, and that these are not."""
    return sorted(image_text_types() - set(model_types))


def counts(surveys: Iterable[Survey]) -> tuple[int, int, int]:
    """How many model types are right, refused, and neither: a type is what all its tiny models are."""
    states: dict[str, set[str]] = {}
    for each in surveys:
        states.setdefault(each.model_type, set()).add("right" if each.right else "refused" if each.refusal else "")
    right, refused = (sum(held == {state} for held in states.values()) for state in ("right", "refused"))
    return right, refused, len(states) - right - refused


def page(types: Types, command: str, whole: bool = True) -> str:
    """A page of Markdown: types that are right, those that are refused, and those that fail.

    Args:
        whole: the surveys are all that there are, and the page names the types that are not among them.
    """
    surveys = [types.surveys[name] for name in sorted(types.surveys)]
    right = [each for each in surveys if each.right]
    refused = [each for each in surveys if each.refusal is not None]
    others = [each for each in surveys if not each.right and each.refusal is None]
    versions = " and ".join(f"{name} {version}" for name, version in types.versions.items())
    of_right, of_refused, of_others = counts(surveys)
    model_types = {each.model_type for each in surveys}
    missing = untried(model_types) if whole else []
    lines = [
        "# Which models work", "",
        f"`{command}` wrote this page: tiny models of each type, with random weights, held to the plain model. With "
        f"{versions}: {of_right} of {len(model_types)} model types are right in all that was tried, {of_refused} are "
        f"refused by name, {of_others} fall short. `hawk-compile inspect TYPE` says the same of one type. Exports "
        "do not count in this.", "",
        f"The {len(surveys)} rows are tiny models. A name that goes on behind the type's with a dot and words is a "
        "variant of it, with other layers or sizes.", "", *variants_of(surveys),
        "*Nothing removed*: at ratio 0 the logits are bit for bit the plain model's. *Selection*: of the visual tokens "
        "those are kept that score best by hand, from the queries and keys that the plain model's attention compares "
        "where every angle of its rotary embedding is zero. *Prefill* and *decode*: with half of the visual tokens "
        "removed, the logits are those of the plain model run on hand-gathered tokens, in the "
        "prefill, where other kept tokens give other ones, and over five more tokens of `generate`. *Several turns*: "
        "so are those of a text turn on the same cache. *Padded batches*: every row is as it is alone. *Video*: "
        "nothing removed, prefill and decode, with frames in the places of images. *Restore*: afterwards the model is "
        "the plain one. *Layer*: the decoder layer that scores, in front of which tokens are removed. *Seconds*: what "
        "all checks but the exports took. *ONNX* and *OpenVINO*: the exported model generates the ids that the "
        "optimised one does, and keeps the same tokens.", "",
        "*Yes*: it is so. *—*: the check could not be asked, because the model's forward requires an image in every "
        "turn, because it takes no videos or takes frames for images, or because the plain model itself fails or "
        "gives another result there. *Refused*: an error of this package says what of the model stands against it. "
        "*Fails*: it ends in any other error. *Wrong*: the result is another. *Not tried*: nobody exported it, a "
        "package that the model needs was missing, or no tiny model has such a video.",
    ]  # fmt: skip
    if right:
        lines += ["", "## Right", "", *table_of(right), *not_exported(right)]
    if refused:
        text = "Nothing is changed: `optimize`, or the first prompt, raises an error that says so."
        lines += ["", "## Refused", "", text, "", "| type | why |", "| --- | --- |"]
        lines += [f"| {each.name} | {cell(why_of(each))} |" for each in refused]
    if others:
        lines += ["", "## Falls short", "", *table_of(others), ""]
        lines += [f"- {each.name}: {cell(each.trouble)}" for each in others]
    if missing:
        lines += ["", "## Not tried", "", f"Types with images that have no tiny model: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def variants_of(surveys: list[Survey]) -> list[str]:
    """What is special of each variant."""
    variants = [each for each in surveys if each.name != each.model_type and each.notes]
    return [*(f"- *{each.name}*: {'; '.join(each.notes)}." for each in variants), *([""] if variants else [])]


def why_of(survey: Survey) -> str:
    """Why a model is refused, without the remedy of naming this page."""
    return (survey.refusal or "").removesuffix(f"; {OTHER_MODEL}")


def not_exported(surveys: list[Survey]) -> list[str]:
    """Why types that are right are not exported."""
    found = [(each.name, COLUMNS.get(form, form), outcome)
             for each in surveys for form, outcome in each.unexported.items()]  # fmt: skip
    if not found:
        return []
    text = "`hawk_compile.export` raises this error of theirs; `optimize` runs them as the table says."
    rows = [f"| {name} | {form} | {cell(each.detail)} |" for name, form, each in found if each.status != "untried"]
    untried = [f"Not tried: {name} to {form} ({cell(each.detail)})." for name, form, each in found
               if each.status == "untried"]  # fmt: skip
    lines = ["", "### Not exported"]
    lines += ["", text, "", "| type | to | why |", "| --- | --- | --- |", *rows] if rows else []
    return [*lines, *(line for each in untried for line in ("", each))]


def table_of(surveys: list[Survey]) -> list[str]:
    tried = [name for name in COLUMNS if any(name in each.outcomes for each in surveys)]
    heads = ["type", "layer", *(COLUMNS[name] for name in tried), "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for each in surveys:
        marks = [mark(each, name) for name in tried]
        lines.append(f"| {each.name} | {each.layer} | {' | '.join(marks)} | {each.seconds:.0f} |")
    return lines


def mark(survey: Survey, check: str) -> str:
    if check in survey.outcomes:
        return MARKS[survey.outcomes[check].status]
    return "not tried" if check in FORMATS else "—"


def cell(text: str | None) -> str:
    """A text as it may stand in a table: one line, no bars."""
    return " ".join((text or "").split()).replace("|", "\\|")


def changes(before: Types, now: Types) -> list[str]:
    """What is new, what broke and what was mended since an earlier survey, a line each; of what was asked."""
    lines = []
    for name, survey in sorted(now.surveys.items()):
        if not survey.asked:
            continue
        earlier = before.surveys.get(name)
        state = standing(survey)
        if earlier is None:
            lines.append(f"new: {name}: {state}")
        elif standing(earlier) != state:
            word = "broke" if name in broken(before, now) else "mended" if survey.right else "changed"
            lines.append(f"{word}: {name}: {state}; it was {standing(earlier)}")
    return lines + [f"gone: {name}" for name in sorted(before.surveys.keys() - now.surveys.keys())]


def broken(before: Types, now: Types) -> list[str]:
    """The tiny models that were right in an earlier survey and are not."""
    both = sorted(before.surveys.keys() & now.surveys.keys())
    return [name for name in both if before.surveys[name].right and now.surveys[name].asked
            and not now.surveys[name].right]  # fmt: skip


def standing(survey: Survey) -> str:
    """Right, refused, or the kind of failure: the check that fails first and the error's class."""
    if survey.right:
        return "right"
    if survey.refusal is not None:
        return "refused"
    name, outcome = next((name, each) for name, each in survey.pruned.items() if each.status not in ("right", *OPEN))
    kind = outcome.detail.partition(":")[0]
    return f"{outcome.status} at {COLUMNS.get(name, name)} ({kind})"


def chosen(types: Mapping[str, Any], asked: Iterable[str]) -> list[str]:
    """The names among the types.

    Raises:
        InputError: a name that is none.
    """
    missing = [name for name in asked if name not in types]
    if missing:
        raise InputError(f"types must be among {', '.join(sorted(types))}, got {', '.join(missing)}")
    return list(asked) or sorted(types)
